// Raw pointers, sizes and a stream: this header and the .cu file know nothing of PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_type.h"

namespace petl {

// Elements (of the sums' dtype) of workspace that column_sum needs.
int64_t column_sum_workspace(int64_t rows, int64_t columns);

// sums[j] = Σ over rows of matrix[row * columns + j], in fp32 (fp64 for fp64). Two passes and no atomics: the result
// is the same in every run. Pointers are on the device; the launch is asynchronous on stream.
cudaError_t column_sum(
    const void* matrix,
    FloatType type,
    int64_t rows,
    int64_t columns,
    void* sums,
    void* workspace,
    cudaStream_t stream);

} // namespace petl
