// Connects the CUDA kernels, which know no PyTorch, with tensors. Compiled only where PyTorch has CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <vector>

#include "float_type.h"

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

} // namespace
} // namespace petl

TORCH_LIBRARY(petl_cuda, m) {
}
