// Products of matrices, rounded once.
//
// The library's, where the processor is made for the dtype. Without instructions for 16-bit numbers PyTorch multiplies
// them with plain loops, many times slower than fp32: there the numbers are widened in blocks, multiplied in fp32, summed
// in fp32 and rounded once. No copy of a whole matrix is made.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace petl {

// Whether products of this dtype are made here and not by the library.
bool widens(at::ScalarType dtype);

// out (M, N) = [out +] scale · left (M, K) right (K, N) [+ bias (N,)], the sum rounded once, to out's dtype. left, right and
// bias are of one dtype, out too or (for 16-bit numbers) fp32. Rows or columns of left and of right lie side by side, and
// rows of out do.
void product_out(
    at::Tensor out,
    const at::Tensor& left,
    const at::Tensor& right,
    bool add = false,
    double scale = 1,
    const std::optional<at::Tensor>& bias = std::nullopt);

// The kernel of petl_kernels/ops/product.py.
void product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add);

} // namespace petl
