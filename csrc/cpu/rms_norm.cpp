// The formulas are in petl_kernels/ops/rms_norm.py.
#include "kernel.h"
#include "norm.h"

namespace petl {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const auto [y, _, rstd] = norm_forward<false>(x, weight, std::nullopt, eps);
  return {y, rstd};
}

Tensor rms_norm_from_statistics(const Tensor& x, const Tensor& rstd, const Tensor& weight) {
  return norm_from_statistics<false>(x, std::nullopt, rstd, weight, std::nullopt);
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight, bool need_dx, bool need_dweight) {
  const auto [dx, dweight, _] = norm_backward<false>(dy, x, std::nullopt, rstd, weight, need_dx, need_dweight, false);
  return {dx, dweight};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(rms_norm);
  PETL_KERNEL(rms_norm_from_statistics);
  PETL_KERNEL(rms_norm_backward);
}
