// multiply() of csrc/cuda/products.h for Python: numbers and addresses.
#include "products.h"

extern "C" const char* call(
    int fp32, int64_t rows, int64_t columns, int64_t inner, const void* left, int64_t left_stride, const void* right,
    int64_t right_stride, int transposed, void* out, int64_t out_stride, float beta, const void* bias, uint8_t* bits,
    int64_t bits_stride, int timed, int64_t* workspace) {
  const auto out_type = fp32 ? petl::FloatType::fp32 : petl::FloatType::bf16;
  const auto behind = bits ? petl::Behind::relu_bits : bias ? petl::Behind::bias : petl::Behind::nothing;
  const petl::Product product{
      petl::FloatType::bf16, out_type, rows, columns, inner, left, right, left_stride, right_stride, transposed != 0,
      out, out_stride, 1, beta, behind, bias, bits, bits_stride};
  const size_t bytes = petl::product_workspace(product);
  *workspace = static_cast<int64_t>(bytes);
  return petl::multiply(product, nullptr, bytes, timed != 0, nullptr);
}
