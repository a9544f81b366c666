// Between fp32 and a matrix' dtype, by name: PyTorch compiles CUDA files without the conversions of 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace petl {

__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}
__device__ inline float widen(__half value) {
  return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// To the nearest, ties to even.
template <typename T>
__device__ T narrow(float value) {
  return static_cast<T>(value);
}
template <>
__device__ inline __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}

} // namespace petl
