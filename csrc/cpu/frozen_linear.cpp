// The formulas are in petl_kernels/ops/frozen_linear.py.
#include "column_sum.h"
#include "kernel.h"
#include "weight.h"

namespace petl {

Tensor frozen_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor y = project(as_rows(x), {weight, weight.size(0), weight.size(1)}, bias);
  return with_sizes(y, with_features(x, weight.size(0)));
}

std::tuple<Tensor, Tensor> frozen_linear_backward(
    const Tensor& dy, const Tensor& weight, bool need_dx, bool need_dbias) {
  const Tensor rows = as_rows(dy);
  Tensor dx = need_dx ? Tensor() : absent(dy.scalar_type());
  if (need_dx) {
    dx = project_back(rows, {weight, weight.size(0), weight.size(1)});
    dx = with_sizes(dx, with_features(dy, weight.size(1)));
  }
  Tensor dbias = need_dbias ? column_sum(rows) : absent(compute_type(dy));
  return {dx, dbias};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(frozen_linear);
  PETL_KERNEL(frozen_linear_backward);
}
