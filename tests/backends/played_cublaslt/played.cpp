// cuBLASLt in host memory: matrices column by column in bf16 or fp32, as its documentation has them, and what the
// library that is played was asked for. Kernel k of those it offers takes `played_times[k]`; number 1 cannot run.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

struct cublasLtMatmulDescOpaque_t {
  cublasOperation_t a = CUBLAS_OP_N, b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_ld = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  int64_t rows, columns, ld;
};
struct cublasLtMatmulPreferenceOpaque_t {};

extern "C" {
int played_captures = 0, played_heuristics = 0, played_alive = 0;
int played_runs[64], played_run_count = 0;
double played_times[] = {5, 1, 3, 4}, played_now = 0;
}

namespace {

float number(const void* data, cudaDataType_t type, int64_t at) {
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void put(void* data, cudaDataType_t type, int64_t at, float value) {
  if (type == CUDA_R_32F) {
    static_cast<float*>(data)[at] = value;
    return;
  }
  uint32_t bits;  // the test's values need no rounding
  std::memcpy(&bits, &value, 4);
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(bits >> 16);
}

template <typename T>
void copy(T& to, const void* from, size_t size) {
  std::memcpy(&to, from, std::min(size, sizeof(T)));
}

template <typename T, typename... Given>
cublasStatus_t make(T** made, Given... given) {
  ++played_alive;
  *made = new T{given...};
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t destroy(T* made) {
  --played_alive;
  delete made;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new int(0);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t op, const void* alpha, const void* a, cublasLtMatrixLayout_t la,
    const void* b, cublasLtMatrixLayout_t lb, const void* beta, const void* c, cublasLtMatrixLayout_t lc, void* d,
    cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t* kernel, void*, size_t bytes, cudaStream_t) {
  played_runs[played_run_count++] = kernel->number;
  if (kernel->number == 1 || bytes < static_cast<size_t>(100 * kernel->number)) return CUBLAS_STATUS_NOT_SUPPORTED;
  played_now += played_times[kernel->number];
  const bool at = op->a == CUBLAS_OP_T, bt = op->b == CUBLAS_OP_T;
  const int64_t inner = at ? la->rows : la->columns;
  if ((at ? la->columns : la->rows) != ld->rows || (bt ? lb->rows : lb->columns) != ld->columns ||
      (bt ? lb->columns : lb->rows) != inner || lc->rows != ld->rows || lc->columns != ld->columns)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  for (int64_t j = 0; j < ld->columns; ++j) {
    for (int64_t i = 0; i < ld->rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < inner; ++k)
        sum += static_cast<double>(number(a, la->type, at ? i * la->ld + k : k * la->ld + i)) *
            number(b, lb->type, bt ? k * lb->ld + j : j * lb->ld + k);
      sum *= *static_cast<const float*>(alpha);
      const float before = *static_cast<const float*>(beta);
      if (before != 0) sum += before * number(c, lc->type, j * lc->ld + i);
      if (op->epilogue != CUBLASLT_EPILOGUE_DEFAULT) sum += number(op->bias, la->type, i);
      if (op->epilogue == CUBLASLT_EPILOGUE_RELU_AUX_BIAS) {
        if (op->aux_ld % 128 != 0 || op->aux_ld < ld->rows) return CUBLAS_STATUS_NOT_SUPPORTED;
        auto& byte = static_cast<uint8_t*>(op->aux)[(j * op->aux_ld + i) / 8];
        byte = static_cast<uint8_t>((byte & ~(1 << i % 8)) | (sum > 0) << i % 8);
        sum = std::max(sum, 0.0);
      }
      put(d, ld->type, j * ld->ld + i, static_cast<float>(sum));
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int most, cublasLtMatmulHeuristicResult_t* found, int* count) {
  ++played_heuristics;
  *count = std::min(most, 4);
  for (int k = 0; k < *count; ++k) found[k] = {{k}, static_cast<size_t>(100 * k), CUBLAS_STATUS_SUCCESS};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t) {
  return make(made);
}

cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t op, cublasLtMatmulDescAttributes_t name, const void* value, size_t size) {
  switch (name) {
    case CUBLASLT_MATMUL_DESC_TRANSA: copy(op->a, value, size); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: copy(op->b, value, size); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: copy(op->epilogue, value, size); break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: copy(op->bias, value, size); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: copy(op->aux_ld, value, size); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: copy(op->aux, value, size); break;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) { return destroy(made); }
cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* made, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld) {
  return make(made, type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), ld);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) { return destroy(made); }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) { return make(made); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) { return destroy(made); }
const char* cublasLtGetStatusString(cublasStatus_t) { return "not supported"; }
}

cudaError_t cudaGetDevice(int* device) { return *device = 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = played_captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  ++played_alive;
  *event = new double(0);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  --played_alive;
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = played_now;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return played_captures; }
cudaError_t cudaEventElapsedTime(float* time, cudaEvent_t begin, cudaEvent_t end) {
  *time = static_cast<float>(*end - *begin);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "waited in a capture"; }
