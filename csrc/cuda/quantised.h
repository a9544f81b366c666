// Raw pointers, sizes and a stream: this header and the .cu file know nothing of PyTorch. Layouts and rounding are those
// of petl_kernels/ops/quantised.py, to the bit. Pointers are on the device; every launch is asynchronous on stream.
// Weights come in and go out in fp32, fp16 or bf16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_type.h"

namespace petl {

// data (rows, columns) and scale (rows) of a contiguous weight.
cudaError_t quantise_int8(
    const void* weight,
    FloatType type,
    int64_t rows,
    int64_t columns,
    int8_t* data,
    float* scale,
    cudaStream_t stream);

// Bytes of workspace that quantise_nf4 needs.
int64_t quantise_nf4_workspace(int64_t values);

// The four parts of a contiguous weight of so many values. map: the 256 sorted numbers that the bytes of absmax stand for.
cudaError_t quantise_nf4(
    const void* weight,
    FloatType type,
    int64_t values,
    const float* map,
    uint8_t* data,
    uint8_t* absmax,
    float* absmax_scale,
    float* absmax_offset,
    void* workspace,
    cudaStream_t stream);

// out (rows, columns) = rows first_row and on of the weight.
cudaError_t dequantise_int8(
    const int8_t* data,
    const float* scale,
    int64_t first_row,
    int64_t rows,
    int64_t columns,
    FloatType type,
    void* out,
    cudaStream_t stream);

// out = so many values of the flattened weight, from the value `first` on.
cudaError_t dequantise_nf4(
    const uint8_t* data,
    const uint8_t* absmax,
    const float* absmax_scale,
    const float* absmax_offset,
    const float* map,
    int64_t first,
    int64_t values,
    FloatType type,
    void* out,
    cudaStream_t stream);

} // namespace petl
