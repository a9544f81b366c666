#include "packed_relu.h"

#include "convert.h"

namespace petl {
namespace {

// A warp takes kWords times 32 neighbouring elements of a row: one ballot makes the word of bits of 32, and every lane
// stores one of the 4 kWords = 32 bytes.
constexpr int kLanes = 32, kWords = 8, kWarps = 8;
constexpr int64_t kRun = kLanes * kWords;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__device__ bool positive(T value) {
  return !(widen(value) <= 0);
}

// The run of a warp: where it begins, and how much of its row is left there.
struct Run {
  int64_t element, byte, elements_left, bytes_left;
};

__device__ bool run_of_warp(int64_t rows, int64_t features, int64_t runs, Run& run) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t row = warp / runs, column = warp % runs * kRun;
  const int64_t row_bytes = (features + 7) / 8;
  run = {row * features + column, row * row_bytes + column / 8, features - column, row_bytes - column / 8};
  return row < rows;
}

template <typename T>
__global__ void forward(const T* z, int64_t rows, int64_t features, int64_t runs, T* y, uint8_t* bits) {
  Run run;
  if (!run_of_warp(rows, features, runs, run)) {
    return; // the whole warp: its lanes share a run
  }
  const int lane = threadIdx.x;
  T values[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t j = k * kLanes + lane;
    values[k] = j < run.elements_left ? z[run.element + j] : narrow<T>(0.0f);
  }
  unsigned word_of_lane = 0;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t j = k * kLanes + lane;
    const bool keep = positive(values[k]);
    const unsigned word = __ballot_sync(kAll, keep);
    word_of_lane = lane / 4 == k ? word : word_of_lane;
    if (j < run.elements_left) {
      y[run.element + j] = keep ? values[k] : narrow<T>(0.0f);
    }
  }
  if (lane < run.bytes_left) {
    bits[run.byte + lane] = static_cast<uint8_t>(word_of_lane >> (8 * (lane % 4)));
  }
}

template <typename T>
__global__ void backward(const T* dy, const uint8_t* bits, int64_t rows, int64_t features, int64_t runs, T* dz) {
  Run run;
  if (!run_of_warp(rows, features, runs, run)) {
    return;
  }
  const int lane = threadIdx.x;
  const unsigned byte_of_lane = lane < run.bytes_left ? bits[run.byte + lane] : 0;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t j = k * kLanes + lane;
    const unsigned byte = __shfl_sync(kAll, byte_of_lane, 4 * k + lane / 8);
    if (j < run.elements_left) {
      dz[run.element + j] = byte >> (lane % 8) & 1 ? dy[run.element + j] : narrow<T>(0.0f);
    }
  }
}

struct Launch {
  int64_t rows, features, runs;
  unsigned blocks;
};

Launch launch_of(int64_t rows, int64_t features) {
  if (features % 8 == 0) {
    // Rows that end with a byte follow each other without a gap.
    features *= rows;
    rows = 1;
  }
  const int64_t runs = (features + kRun - 1) / kRun;
  return {rows, features, runs, static_cast<unsigned>((rows * runs + kWarps - 1) / kWarps)};
}

template <typename T>
cudaError_t run_forward(
    const void* z, int64_t rows, int64_t features, void* y, uint8_t* bits, cudaStream_t stream) {
  const Launch launch = launch_of(rows, features);
  if (launch.blocks > 0) {
    forward<T><<<launch.blocks, dim3(kLanes, kWarps), 0, stream>>>(
        static_cast<const T*>(z), launch.rows, launch.features, launch.runs, static_cast<T*>(y), bits);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_backward(
    const void* dy, const uint8_t* bits, int64_t rows, int64_t features, void* dz, cudaStream_t stream) {
  const Launch launch = launch_of(rows, features);
  if (launch.blocks > 0) {
    backward<T><<<launch.blocks, dim3(kLanes, kWarps), 0, stream>>>(
        static_cast<const T*>(dy), bits, launch.rows, launch.features, launch.runs, static_cast<T*>(dz));
  }
  return cudaGetLastError();
}

} // namespace

cudaError_t packed_relu(
    const void* z, FloatType type, int64_t rows, int64_t features, void* y, uint8_t* bits, cudaStream_t stream) {
  switch (type) {
    case FloatType::fp32:
      return run_forward<float>(z, rows, features, y, bits, stream);
    case FloatType::fp64:
      return run_forward<double>(z, rows, features, y, bits, stream);
    case FloatType::fp16:
      return run_forward<__half>(z, rows, features, y, bits, stream);
    case FloatType::bf16:
      return run_forward<__nv_bfloat16>(z, rows, features, y, bits, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t packed_relu_backward(
    const void* dy,
    const uint8_t* bits,
    FloatType type,
    int64_t rows,
    int64_t features,
    void* dz,
    cudaStream_t stream) {
  switch (type) {
    case FloatType::fp32:
      return run_backward<float>(dy, bits, rows, features, dz, stream);
    case FloatType::fp64:
      return run_backward<double>(dy, bits, rows, features, dz, stream);
    case FloatType::fp16:
      return run_backward<__half>(dy, bits, rows, features, dz, stream);
    case FloatType::bf16:
      return run_backward<__nv_bfloat16>(dy, bits, rows, features, dz, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace petl
