// Connects the CUDA kernels, which know no PyTorch, with tensors. Compiled only where PyTorch has CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "column_sum.h"
#include "packed_relu.h"
#ifdef PETL_CUBLASLT
#include "products.h"
#endif
#include "quantised.h"

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

// petl_kernels/ops/quantised.py. The kernels take fp32, fp16 and bf16; fp64 is cast, as the reference casts it.
Tensor as_weight(const Tensor& weight) {
  return (weight.scalar_type() == at::kDouble ? weight.to(at::kFloat) : weight).contiguous();
}

std::vector<Tensor> quantise_int8_cuda(const Tensor& given) {
  const c10::cuda::CUDAGuard guard(given.device());
  const Tensor weight = as_weight(given);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor data = at::empty({rows, columns}, weight.options().dtype(at::kChar));
  Tensor scale = at::empty({rows}, weight.options().dtype(at::kFloat));
  C10_CUDA_CHECK(quantise_int8(
      weight.const_data_ptr(),
      type_of(weight),
      rows,
      columns,
      data.mutable_data_ptr<int8_t>(),
      scale.mutable_data_ptr<float>(),
      c10::cuda::getCurrentCUDAStream()));
  return {data, scale};
}

std::vector<Tensor> quantise_nf4_cuda(const Tensor& given, const Tensor& map) {
  const c10::cuda::CUDAGuard guard(given.device());
  const Tensor weight = as_weight(given);
  const int64_t values = weight.numel(), blocks = (values + 63) / 64;
  const auto bytes = weight.options().dtype(at::kByte), floats = weight.options().dtype(at::kFloat);
  Tensor data = at::empty({(values + 1) / 2}, bytes), absmax = at::empty({blocks}, bytes);
  Tensor absmax_scale = at::empty({(blocks + 255) / 256}, floats), absmax_offset = at::empty({1}, floats);
  Tensor workspace = at::empty({quantise_nf4_workspace(values)}, bytes);
  C10_CUDA_CHECK(quantise_nf4(
      weight.const_data_ptr(),
      type_of(weight),
      values,
      map.const_data_ptr<float>(),
      data.mutable_data_ptr<uint8_t>(),
      absmax.mutable_data_ptr<uint8_t>(),
      absmax_scale.mutable_data_ptr<float>(),
      absmax_offset.mutable_data_ptr<float>(),
      workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return {data, absmax, absmax_scale, absmax_offset};
}

Tensor dequantise_cuda(
    at::TensorList given, int64_t first_row, int64_t rows, int64_t columns, at::ScalarType dtype, const Tensor& map) {
  std::vector<Tensor> parts;
  for (const Tensor& part : given) {
    parts.push_back(part.contiguous());
  }
  const c10::cuda::CUDAGuard guard(parts[0].device());
  const auto kernel_dtype = dtype == at::kDouble ? at::kFloat : dtype;
  Tensor out = at::empty({rows, columns}, parts[0].options().dtype(kernel_dtype));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (parts.size() == 2) {
    C10_CUDA_CHECK(dequantise_int8(
        parts[0].const_data_ptr<int8_t>(),
        parts[1].const_data_ptr<float>(),
        first_row,
        rows,
        columns,
        type_of(out),
        out.mutable_data_ptr(),
        stream));
  } else {
    C10_CUDA_CHECK(dequantise_nf4(
        parts[0].const_data_ptr<uint8_t>(),
        parts[1].const_data_ptr<uint8_t>(),
        parts[2].const_data_ptr<float>(),
        parts[3].const_data_ptr<float>(),
        map.const_data_ptr<float>(),
        first_row * columns,
        rows * columns,
        type_of(out),
        out.mutable_data_ptr(),
        stream));
  }
  return out.to(dtype);
}

#ifdef PETL_CUBLASLT
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
#endif

} // namespace
} // namespace petl

TORCH_LIBRARY(petl_cuda, m) {
  m.def(
      "frozen_linear_backward",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::frozen_linear_backward_cuda)));
  m.def("packed_relu", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::packed_relu_cuda)));
  m.def("packed_relu_backward", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::packed_relu_backward_cuda)));
  m.def("quantise_int8", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::quantise_int8_cuda)));
  m.def("quantise_nf4", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::quantise_nf4_cuda)));
  // Its dtype has no type of its own among those that a schema is inferred from.
  m.def(
      "dequantise(Tensor[] parts, int first_row, int rows, int columns, ScalarType dtype, Tensor map) -> Tensor",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::dequantise_cuda)));
#ifdef PETL_CUBLASLT
  m.def(
      "multiply(Tensor(a!) out, Tensor left, Tensor right, bool transposed, Tensor? bias, Tensor(b!)? bits, bool add)"
      " -> ()",
      torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(petl::multiply_cuda)));
#endif
}
