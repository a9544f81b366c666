// The formulas are in petl_kernels/ops/layer_norm.py.
#include "kernel.h"
#include "norm.h"

namespace petl {

std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  const auto [y, mean, rstd] = norm_forward<true>(x, weight, bias, eps);
  return {y, *mean, rstd};
}

Tensor layer_norm_from_statistics(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const OptionalTensor& bias) {
  return norm_from_statistics<true>(x, mean, rstd, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const Tensor& weight,
    bool need_dx,
    bool need_dweight,
    bool need_dbias) {
  return norm_backward<true>(dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias);
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(layer_norm);
  PETL_KERNEL(layer_norm_from_statistics);
  PETL_KERNEL(layer_norm_backward);
}
