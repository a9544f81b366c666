// Products of matrices, rounded once.
//
// The library's, where the processor is made for the dtype. Without instructions for 16-bit numbers PyTorch multiplies
// them with plain loops, many times slower than fp32: there the numbers are widened in blocks, multiplied in fp32, summed
// in fp32 and rounded once. No copy of a whole matrix is made.
#pragma once

#include "common.h"

namespace petl {

// Where the numbers of a matrix lie. Cheaper than a tensor to cut and to transpose.
struct MatrixView {
  MatrixView(
      const void* data, at::ScalarType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(data),
        dtype(dtype),
        rows(rows),
        columns(columns),
        row_stride(row_stride),
        column_stride(column_stride) {}

  MatrixView(const Tensor& matrix)
      : MatrixView(
            matrix.const_data_ptr(),
            matrix.scalar_type(),
            matrix.size(0),
            matrix.size(1),
            matrix.stride(0),
            matrix.stride(1)) {}

  MatrixView t() const { return {data, dtype, columns, rows, column_stride, row_stride}; }

  MatrixView columns_from(int64_t first, int64_t count) const {
    const auto* from = static_cast<const std::byte*>(data) + first * column_stride * c10::elementSize(dtype);
    return {from, dtype, rows, count, row_stride, column_stride};
  }

  Tensor tensor() const {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, at::dtype(dtype));
  }

  const void* data;
  at::ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// Whether products of this dtype are made here and not by the library.
bool widens(at::ScalarType dtype);

// out (M, N) = [out +] scale · left (M, K) right (K, N) [+ bias (N,)], the sum rounded once, to out's dtype. left, right and
// bias are of one dtype, out too or (for 16-bit numbers) fp32. Rows or columns of left and of right lie side by side, and
// rows of out do.
void product_out(
    const MatrixView& out,
    const MatrixView& left,
    const MatrixView& right,
    bool add = false,
    double scale = 1,
    const OptionalTensor& bias = std::nullopt);

// The bytes of scratch that product_out() takes beside its matrices where the dtype is widened.
int64_t product_bytes(int64_t rows, int64_t depth, int64_t columns);

} // namespace petl
