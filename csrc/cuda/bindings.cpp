// Connects the CUDA kernels, which know no PyTorch, with tensors. Compiled only where PyTorch has CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "column_sum.h"

namespace petl {
namespace {

using at::Tensor;

ColumnSumType type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ColumnSumType::fp32;
    case at::kDouble:
      return ColumnSumType::fp64;
    case at::kHalf:
      return ColumnSumType::fp16;
    case at::kBFloat16:
      return ColumnSumType::bf16;
    default:
      TORCH_CHECK(false, "column_sum takes fp32, fp64, fp16 or bf16, not ", tensor.scalar_type());
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

} // namespace
} // namespace petl

TORCH_LIBRARY(petl_cuda, m) {
  m.def(
      "frozen_linear_backward",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::frozen_linear_backward_cuda)));
}
