// The formulas are in petl_kernels/ops/dropout_add.py.
#include "kernel.h"
#include "residual.h"

namespace petl {

Tensor dropout_add(const Tensor& x, const Tensor& residual, double p, const Tensor& seed) {
  const auto stream = at::promote_types(x.scalar_type(), residual.scalar_type());
  const Tensor rows = in_dtype(x, served(x.scalar_type(), stream)), residual_rows = in_dtype(residual, stream);
  const Dropout mask(p, seed, x.size(-1));
  Tensor y = empty(x.sizes(), stream);
  dispatch_stream(rows.scalar_type(), stream, [&](auto narrow, auto wide) {
    const auto* x_data = rows.const_data_ptr<decltype(narrow)>();
    const auto* residual_data = residual_rows.const_data_ptr<decltype(wide)>();
    auto* y_data = y.mutable_data_ptr<decltype(wide)>();
    parallel_chunks(y.numel(), [&](int64_t first, int64_t count) {
      add_dropped(mask, x_data + first, residual_data + first, y_data + first, count, first);
    });
  });
  return y;
}

Tensor dropout_add_backward(const Tensor& dy, at::ScalarType dtype, double p, const Tensor& seed) {
  const Tensor rows = dy.contiguous();
  const Dropout mask(p, seed, dy.size(-1));
  Tensor dx = empty(dy.sizes(), served(dtype, dy.scalar_type()));
  dispatch_stream(dx.scalar_type(), dy.scalar_type(), [&](auto narrow, auto wide) {
    const auto* dy_data = rows.const_data_ptr<decltype(wide)>();
    auto* dx_data = dx.mutable_data_ptr<decltype(narrow)>();
    parallel_chunks(dx.numel(), [&](int64_t first, int64_t count) {
      write_dropped(mask, dy_data + first, dx_data + first, count, first);
    });
  });
  return in_dtype(dx, dtype);
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(dropout_add);
  PETL_KERNEL(dropout_add_backward);
}
