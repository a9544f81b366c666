#include "products.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace petl {
namespace {

constexpr size_t kWorkspace = 32 << 20;
constexpr int kChoices = 8, kRuns = 3;

// The functions of cuBLASLt that are called.
#define PETL_FUNCTIONS(each) \
  each(cublasLtCreate) \
  each(cublasLtMatmul) \
  each(cublasLtMatmulAlgoGetHeuristic) \
  each(cublasLtMatmulDescCreate) \
  each(cublasLtMatmulDescSetAttribute) \
  each(cublasLtMatmulDescDestroy) \
  each(cublasLtMatrixLayoutCreate) \
  each(cublasLtMatrixLayoutDestroy) \
  each(cublasLtMatmulPreferenceCreate) \
  each(cublasLtMatmulPreferenceSetAttribute) \
  each(cublasLtMatmulPreferenceDestroy) \
  each(cublasLtGetStatusString)

// The library that PyTorch has loaded: the extension is not linked with it, so that it loads where there is none.
struct Library {
#define PETL_MEMBER(name) decltype(&::name) name = nullptr;
  PETL_FUNCTIONS(PETL_MEMBER)
#undef PETL_MEMBER
  bool loaded = false;

  Library() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* file = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (file == nullptr) {
      return;
    }
    loaded = true;
#define PETL_LOAD(name) loaded = loaded && (name = reinterpret_cast<decltype(name)>(dlsym(file, #name))) != nullptr;
    PETL_FUNCTIONS(PETL_LOAD)
#undef PETL_LOAD
  }
};

const Library& library() {
  static const Library found;
  return found;
}

// The status of cuBLASLt or of the runtime that ends a product, as text that lives for ever.
struct Failure {
  const char* what;
};

void check(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw Failure{library().cublasLtGetStatusString(status)};
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw Failure{cudaGetErrorString(error)};
  }
}

cudaDataType_t data_type(FloatType type) {
  return type == FloatType::fp32 ? CUDA_R_32F : type == FloatType::fp16 ? CUDA_R_16F : CUDA_R_16BF;
}

template <typename T>
using Owned = std::unique_ptr<T, cublasStatus_t (*)(T*)>;

Owned<cublasLtMatrixLayoutOpaque_t> layout(FloatType type, int64_t height, int64_t width, int64_t stride) {
  cublasLtMatrixLayout_t made = nullptr;
  check(library().cublasLtMatrixLayoutCreate(&made, data_type(type), height, width, stride));
  return {made, library().cublasLtMatrixLayoutDestroy};
}

// cuBLASLt's matrices lie column by column, so that each of ours is its transpose there: outᵀ = rightᵀ leftᵀ. The first
// operand is `right`, the columns of out are its rows, and the bias and the bits run along them.
struct Descriptors {
  Owned<cublasLtMatmulDescOpaque_t> operation;
  Owned<cublasLtMatrixLayoutOpaque_t> right, left, out;

  explicit Descriptors(const Product& p)
      : operation(nullptr, library().cublasLtMatmulDescDestroy),
        right(
            p.transposed ? layout(p.type, p.inner, p.columns, p.right_stride)
                         : layout(p.type, p.columns, p.inner, p.right_stride)),
        left(layout(p.type, p.inner, p.rows, p.left_stride)),
        out(layout(p.out_type, p.columns, p.rows, p.out_stride)) {
    cublasLtMatmulDesc_t made = nullptr;
    check(library().cublasLtMatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    operation.reset(made);
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    if (p.behind == Behind::nothing) {
      return;
    }
    const bool bits = p.behind == Behind::relu_bits;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, bits ? CUBLASLT_EPILOGUE_RELU_AUX_BIAS : CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(p.type));
    if (bits) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, static_cast<int64_t>(8 * p.bits_stride));
    }
    point(p);
  }

  // At this call's bias and bits.
  void point(const Product& p) {
    if (p.behind != Behind::nothing) {
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    }
    if (p.behind == Behind::relu_bits) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(p.bits));
    }
  }

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t name, const T& value) {
    check(library().cublasLtMatmulDescSetAttribute(operation.get(), name, &value, sizeof(T)));
  }
};

// The properties by which cuBLASLt chooses a kernel. Alignment: the largest power of two, up to 256, that divides all addresses.
using Key = std::array<int64_t, 15>;

int64_t alignment(std::initializer_list<const void*> addresses) {
  uintptr_t all = 256;
  for (const void* address : addresses) {
    all |= reinterpret_cast<uintptr_t>(address);
  }
  return static_cast<int64_t>(all & (~all + 1));
}

Key key_of(const Product& p, int device) {
  return {
      device,
      static_cast<int64_t>(p.type),
      static_cast<int64_t>(p.out_type),
      static_cast<int64_t>(p.behind),
      p.rows,
      p.columns,
      p.inner,
      p.left_stride,
      p.right_stride,
      p.out_stride,
      p.bits_stride,
      p.transposed,
      p.beta != 0,
      alignment({p.left, p.right, p.out}),
      alignment({p.bias, p.bits})};
}

struct Prepared {
  Descriptors descriptors;
  cublasLtMatmulAlgo_t kernel;
  size_t workspace;
};

std::mutex guard; // of what follows, and of the descriptors while they point at a call's tensors
std::map<Key, Prepared> prepared;
std::map<int, cublasLtHandle_t> handles; // of each device, for as long as the process lives

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

cublasLtHandle_t handle_of(int device) {
  if (!library().loaded) {
    throw Failure{"libcublasLt is not there"};
  }
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr) {
    check(library().cublasLtCreate(&handle));
  }
  return handle;
}

void start(
    const Product& p,
    const Descriptors& d,
    float alpha,
    cublasLtHandle_t handle,
    const cublasLtMatmulAlgo_t& kernel,
    void* workspace,
    size_t bytes,
    cudaStream_t stream) {
  check(library().cublasLtMatmul(
      handle, d.operation.get(), &alpha, p.right, d.right.get(), p.left, d.left.get(), &p.beta, p.out, d.out.get(), p.out,
      d.out.get(), &kernel, workspace, bytes, stream));
}

std::vector<cublasLtMatmulHeuristicResult_t> choices_of(
    const Product& p, const Descriptors& d, cublasLtHandle_t handle, size_t bytes) {
  cublasLtMatmulPreference_t made = nullptr;
  check(library().cublasLtMatmulPreferenceCreate(&made));
  const Owned<cublasLtMatmulPreferenceOpaque_t> preference(made, library().cublasLtMatmulPreferenceDestroy);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
    check(library().cublasLtMatmulPreferenceSetAttribute(made, name, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(alignment({p.right})));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(alignment({p.left})));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(alignment({p.out})));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(alignment({p.out})));
  std::vector<cublasLtMatmulHeuristicResult_t> found(kChoices);
  int count = 0;
  check(library().cublasLtMatmulAlgoGetHeuristic(
      handle, d.operation.get(), d.right.get(), d.left.get(), d.out.get(), d.out.get(), made, kChoices, found.data(),
      &count));
  found.resize(count);
  found.erase(
      std::remove_if(found.begin(), found.end(), [](const auto& one) { return one.state != CUBLAS_STATUS_SUCCESS; }),
      found.end());
  if (found.empty()) {
    throw Failure{"cuBLASLt has no kernel for this product"};
  }
  return found;
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() {
    check(cudaEventCreate(&event));
  }
  ~Event() {
    cudaEventDestroy(event);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

// The least of a few runs; infinite where the kernel cannot run. What is added to stays as it is, by alpha = 0.
float time_of(
    const cublasLtMatmulAlgo_t& kernel,
    const Product& p,
    const Descriptors& d,
    cublasLtHandle_t handle,
    void* workspace,
    size_t bytes,
    cudaStream_t stream) {
  const Event begin, end;
  float least = std::numeric_limits<float>::infinity();
  for (int run = 0; run <= kRuns; ++run) { // the first loads the kernel
    check(cudaEventRecord(begin.event, stream));
    try {
      start(p, d, p.beta == 0 ? p.alpha : 0.0f, handle, kernel, workspace, bytes, stream);
    } catch (const Failure&) {
      return std::numeric_limits<float>::infinity();
    }
    check(cudaEventRecord(end.event, stream));
    check(cudaEventSynchronize(end.event));
    float time = 0;
    check(cudaEventElapsedTime(&time, begin.event, end.event));
    least = run == 0 ? least : std::min(least, time);
  }
  return least;
}

const cublasLtMatmulHeuristicResult_t& fastest(
    const std::vector<cublasLtMatmulHeuristicResult_t>& choices,
    const Product& p,
    const Descriptors& d,
    cublasLtHandle_t handle,
    void* workspace,
    size_t bytes,
    cudaStream_t stream) {
  const auto* best = &choices.front();
  float least = std::numeric_limits<float>::infinity();
  for (const auto& choice : choices) {
    const float own = time_of(choice.algo, p, d, handle, workspace, bytes, stream);
    if (own < least) {
      best = &choice;
      least = own;
    }
  }
  return *best;
}

void run(const Product& p, void* workspace, size_t bytes, bool timed, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(guard);
  const int device = current_device();
  const cublasLtHandle_t handle = handle_of(device);
  const Key key = key_of(p, device);
  const auto known = prepared.find(key);
  if (known != prepared.end()) {
    known->second.descriptors.point(p);
    start(p, known->second.descriptors, p.alpha, handle, known->second.kernel, workspace, bytes, stream);
    return;
  }
  cudaStreamCaptureStatus captured;
  check(cudaStreamIsCapturing(stream, &captured));
  const bool captures = captured != cudaStreamCaptureStatusNone;
  Descriptors descriptors(p);
  const auto choices = choices_of(p, descriptors, handle, bytes);
  const auto& choice = timed && !captures ? fastest(choices, p, descriptors, handle, workspace, bytes, stream)
                                          : choices.front();
  start(p, descriptors, p.alpha, handle, choice.algo, workspace, bytes, stream);
  if (!captures) {
    prepared.emplace(key, Prepared{std::move(descriptors), choice.algo, choice.workspaceSize});
  }
}

} // namespace

size_t product_workspace(const Product& product) {
  const std::lock_guard<std::mutex> lock(guard);
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    return 0; // multiply() will say so
  }
  const auto known = prepared.find(key_of(product, device));
  return known == prepared.end() ? kWorkspace : known->second.workspace;
}

const char* multiply(const Product& product, void* workspace, size_t workspace_bytes, bool timed, cudaStream_t stream) {
  try {
    run(product, workspace, workspace_bytes, timed, stream);
    return nullptr;
  } catch (const Failure& failure) {
    return failure.what;
  }
}

} // namespace petl
