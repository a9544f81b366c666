// Connects the CUDA kernels, which know no PyTorch, with tensors. Compiled only where PyTorch has CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "column_sum.h"
#include "packed_relu.h"

namespace petl {
namespace {

using at::Tensor;

FloatType type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return FloatType::fp32;
    case at::kDouble:
      return FloatType::fp64;
    case at::kHalf:
      return FloatType::fp16;
    case at::kBFloat16:
      return FloatType::bf16;
    default:
      TORCH_CHECK(false, "the kernel takes fp32, fp64, fp16 or bf16, not ", tensor.scalar_type());
  }
}

Tensor column_sum_cuda(const Tensor& rows) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const int64_t n = rows.size(0), columns = rows.size(1);
  const auto options = rows.options().dtype(rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor sums = at::empty({columns}, options);
  Tensor workspace = at::empty({column_sum_workspace(n, columns)}, options);
  C10_CUDA_CHECK(column_sum(
      rows.const_data_ptr(),
      type_of(rows),
      n,
      columns,
      sums.mutable_data_ptr(),
      workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return sums;
}

// petl_kernels/ops/frozen_linear.py: cuBLAS does the product, the bias gradient is ours.
std::tuple<Tensor, Tensor> frozen_linear_backward_cuda(
    const Tensor& dy, const Tensor& weight, bool need_dx, bool need_dbias) {
  const Tensor rows = dy.reshape({-1, dy.size(-1)}).contiguous();
  Tensor dx = at::empty({0}, dy.options()), dbias = at::empty({0}, dy.options());
  if (need_dx) {
    auto sizes = dy.sizes().vec();
    sizes.back() = weight.size(1);
    dx = at::mm(rows, weight).view(sizes);
  }
  if (need_dbias) {
    dbias = column_sum_cuda(rows);
  }
  return {dx, dbias};
}

// petl_kernels/ops/activation.py, for relu without dropout.
std::tuple<Tensor, Tensor> packed_relu_cuda(const Tensor& z) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Tensor rows = z.reshape({-1, z.size(-1)}).contiguous();
  const int64_t n = rows.size(0), features = rows.size(1);
  Tensor y = at::empty_like(rows), bits = at::empty({n, (features + 7) / 8}, rows.options().dtype(at::kByte));
  C10_CUDA_CHECK(packed_relu(
      rows.const_data_ptr(),
      type_of(rows),
      n,
      features,
      y.mutable_data_ptr(),
      bits.mutable_data_ptr<uint8_t>(),
      c10::cuda::getCurrentCUDAStream()));
  return {y.view(z.sizes()), bits};
}

Tensor packed_relu_backward_cuda(const Tensor& dy, const Tensor& bits) {
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor rows = dy.reshape({-1, dy.size(-1)}).contiguous(), packed = bits.contiguous();
  Tensor dz = at::empty_like(rows);
  C10_CUDA_CHECK(packed_relu_backward(
      rows.const_data_ptr(),
      packed.const_data_ptr<uint8_t>(),
      type_of(rows),
      rows.size(0),
      rows.size(1),
      dz.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return dz.view(dy.sizes());
}

} // namespace
} // namespace petl

TORCH_LIBRARY(petl_cuda, m) {
  m.def(
      "frozen_linear_backward",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::frozen_linear_backward_cuda)));
  m.def("packed_relu", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::packed_relu_cuda)));
  m.def("packed_relu_backward", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::packed_relu_backward_cuda)));
}
