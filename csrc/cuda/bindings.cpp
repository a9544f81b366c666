// Connects the CUDA kernels, which know no PyTorch, with tensors. Compiled only where PyTorch has CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>

#ifdef PETL_CUBLASLT
#include "products.h"

namespace petl {
namespace {

using at::Tensor;

FloatType type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return FloatType::fp32;
    case at::kHalf:
      return FloatType::fp16;
    case at::kBFloat16:
      return FloatType::bf16;
    default:
      TORCH_CHECK(false, "the product takes fp32, fp16 or bf16, not ", tensor.scalar_type());
  }
}

// petl_kernels/backends/products.py: out = or += left right, or left rightᵀ where `transposed`.
void multiply_cuda(
    const Tensor& out,
    const Tensor& left,
    const Tensor& right,
    bool transposed,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bits,
    bool add) {
  const c10::cuda::CUDAGuard guard(out.device());
  const Tensor own_bias = bias ? bias->to(left.scalar_type()).contiguous() : Tensor();
  Product product{};
  product.type = type_of(left);
  product.out_type = type_of(out);
  product.rows = out.size(0);
  product.columns = out.size(1);
  product.inner = left.size(1);
  product.left = left.const_data_ptr();
  product.right = right.const_data_ptr();
  product.left_stride = left.stride(0);
  product.right_stride = right.stride(0);
  product.transposed = transposed;
  product.out = out.mutable_data_ptr();
  product.out_stride = out.stride(0);
  product.alpha = 1;
  product.beta = add ? 1 : 0;
  product.behind = bits ? Behind::relu_bits : bias ? Behind::bias : Behind::nothing;
  product.bias = bias ? own_bias.const_data_ptr() : nullptr;
  product.bits = bits ? bits->mutable_data_ptr<uint8_t>() : nullptr;
  product.bits_stride = bits ? bits->stride(0) : 0;
  const auto bytes = static_cast<int64_t>(product_workspace(product));
  const Tensor workspace = at::empty({bytes}, out.options().dtype(at::kByte));
  const bool timed = !at::globalContext().deterministicAlgorithms();
  const char* wrong =
      multiply(product, workspace.mutable_data_ptr(), bytes, timed, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(wrong == nullptr, "cuBLASLt: ", wrong);
}

} // namespace
} // namespace petl
#endif

TORCH_LIBRARY(petl_cuda, m) {
#ifdef PETL_CUBLASLT
  m.def(
      "multiply(Tensor(a!) out, Tensor left, Tensor right, bool transposed, Tensor? bias, Tensor(b!)? bits, bool add)"
      " -> ()",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::multiply_cuda)));
#endif
}
