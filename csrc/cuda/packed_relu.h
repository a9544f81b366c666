// Raw pointers, sizes and a stream: this header and the .cu file know nothing of PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_type.h"

namespace petl {

// y = relu(z) of a contiguous (rows, features) matrix, and bits (rows, ceil(features / 8)): bit j % 8 of byte j / 8 of
// a row says whether feature j is above 0 (or NaN). Pointers are on the device; the launch is asynchronous on stream.
cudaError_t packed_relu(
    const void* z, FloatType type, int64_t rows, int64_t features, void* y, uint8_t* bits, cudaStream_t stream);

// dz = dy where the bit is set, else 0.
cudaError_t packed_relu_backward(
    const void* dy,
    const uint8_t* bits,
    FloatType type,
    int64_t rows,
    int64_t features,
    void* dz,
    cudaStream_t stream);

} // namespace petl
