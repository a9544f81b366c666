// cuBLASLt's products with what it can do behind them. Raw pointers, sizes and a stream: no PyTorch here or in the .cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace petl {

// The dtype of a matrix.
enum class FloatType { fp32, fp16, bf16 };

enum class Behind {
  nothing,
  bias, // + bias of each column
  relu_bits, // max(0, . + bias), and one bit an element: whether it is positive
};

// out = alpha left right + beta out of row-major matrices whose rows are `..._stride` elements apart. left (rows, inner);
// right (inner, columns), or (columns, inner) where `transposed`; out (rows, columns). left, right and bias have one type,
// fp16 or bf16; out has it too, or fp32. bits: rows of `bits_stride` bytes, which 16 divides. Pointers are on the device.
struct Product {
  FloatType type, out_type;
  int64_t rows, columns, inner;
  const void *left, *right;
  int64_t left_stride, right_stride;
  bool transposed;
  void* out;
  int64_t out_stride;
  float alpha, beta;
  Behind behind;
  const void* bias;
  uint8_t* bits;
  int64_t bits_stride;
};

// The bytes of workspace that multiply() takes for such a product: those of the kernel that was chosen for its sizes, or
// the most that any kernel may have, where none was chosen yet.
size_t product_workspace(const Product& product);

// Starts the product on the stream of the current device; nullptr, or what went wrong. The first product of its sizes
// looks for a kernel: of cuBLASLt's first choices the fastest where `timed`, which waits for the device, else the first.
// While the stream is captured nothing is timed, and what is chosen is not kept.
const char* multiply(const Product& product, void* workspace, size_t workspace_bytes, bool timed, cudaStream_t stream);

} // namespace petl
