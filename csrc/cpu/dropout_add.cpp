// The formulas are in petl_kernels/ops/dropout_add.py.
#include "elementwise.h"
#include "kernels.h"
#include "rows.h"

namespace petl {
namespace {

// f(narrow(), wide()) for the dtypes of x and of the residual stream: one dtype, or a 16-bit x beside an fp32 stream.
template <typename F>
void dispatch(at::ScalarType x, at::ScalarType stream, const F& f) {
  if (x == at::kBFloat16 && stream == at::kFloat) {
    return f(at::BFloat16(), float());
  }
  if (x == at::kHalf && stream == at::kFloat) {
    return f(at::Half(), float());
  }
  PETL_DISPATCH_FLOATING(stream, "dropout_add", [&] { f(scalar_t(), scalar_t()); });
}

// The dtype in which x is read or written: its own beside the stream's where dispatch() knows the pair.
at::ScalarType served(at::ScalarType x, at::ScalarType stream) {
  return stream == at::kFloat && (x == at::kBFloat16 || x == at::kHalf) ? x : stream;
}

} // namespace

Tensor dropout_add(const Tensor& x, const Tensor& residual, double p, const Tensor& seed) {
  const auto stream = at::promote_types(x.scalar_type(), residual.scalar_type());
  const Tensor rows = in_dtype(x, served(x.scalar_type(), stream)), residual_rows = in_dtype(residual, stream);
  const Dropout mask(p, seed);
  Tensor y = empty(x.sizes(), stream);
  dispatch(rows.scalar_type(), stream, [&](auto narrow, auto wide) {
    using x_t = decltype(narrow);
    using y_t = decltype(wide);
    using acc_t = compute_t<y_t>;
    const auto* x_data = rows.const_data_ptr<x_t>();
    const auto* residual_data = residual_rows.const_data_ptr<y_t>();
    auto* y_data = y.mutable_data_ptr<y_t>();
    parallel_chunks(y.numel(), [&](int64_t first, int64_t count) {
      acc_t values[kChunk], buffer[kChunk];
      convert(x_data + first, values, count);
      drop(mask, values, count, first);
      accumulate(converted(residual_data + first, buffer, count), values, count);
      convert(values, y_data + first, count);
    });
  });
  return y;
}

Tensor dropout_add_backward(const Tensor& dy, at::ScalarType dtype, double p, const Tensor& seed) {
  const Tensor rows = dy.contiguous();
  const Dropout mask(p, seed);
  Tensor dx = empty(dy.sizes(), served(dtype, dy.scalar_type()));
  dispatch(dx.scalar_type(), dy.scalar_type(), [&](auto narrow, auto wide) {
    using x_t = decltype(narrow);
    using y_t = decltype(wide);
    const auto* dy_data = rows.const_data_ptr<y_t>();
    auto* dx_data = dx.mutable_data_ptr<x_t>();
    parallel_chunks(dx.numel(), [&](int64_t first, int64_t count) {
      compute_t<y_t> grads[kChunk];
      convert(dy_data + first, grads, count);
      drop(mask, grads, count, first);
      convert(grads, dx_data + first, count);
    });
  });
  return in_dtype(dx, dtype);
}

} // namespace petl
