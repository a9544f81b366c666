// The formulas are in petl_kernels/ops/dropout_add_norm.py.
#include "kernel.h"
#include "norm.h"
#include "residual.h"

namespace petl {
namespace {

// f(narrow(), stream(), out()): dtypes of the dropped values, of h and of the norm's output.
template <typename F>
void dispatch_all(at::ScalarType narrow, at::ScalarType stream, at::ScalarType out, const F& f) {
  dispatch_stream(narrow, stream, [&](auto dropped, auto wide) {
    if (out == stream) {
      f(dropped, wide, wide);
    } else {
      f(dropped, wide, compute_t<decltype(wide)>());
    }
  });
}

// (h, u, mean, rstd); the mean has size 0 without kCentred.
template <bool kCentred>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& y,
    const Tensor& residual,
    const Tensor& weight,
    const OptionalTensor& bias,
    double eps,
    double p,
    const OptionalTensor& seed) {
  const auto stream = at::promote_types(y.scalar_type(), residual.scalar_type());
  const Tensor dropped = in_dtype(y, served(y.scalar_type(), stream)), residuals = in_dtype(residual, stream);
  const Dropout mask(p, seed, y.size(-1));
  Tensor h = empty(y.sizes(), stream), u;
  const Tensor rows = as_rows(h);
  const int64_t d = rows.size(1);
  const auto out = output_type(h, weight), sum = compute_type(h);
  const auto tokens = y.sizes().slice(0, y.dim() - 1);
  Tensor rstd = empty(tokens, sum), mean = kCentred ? empty(tokens, sum) : absent(sum);
  dispatch_all(dropped.scalar_type(), stream, out, [&](auto narrow, auto wide, auto result) {
    using h_t = decltype(wide);
    using out_t = decltype(result);
    using acc_t = compute_t<h_t>;
    const auto* y_data = dropped.const_data_ptr<decltype(narrow)>();
    const auto* residual_data = residuals.const_data_ptr<h_t>();
    auto* h_data = h.mutable_data_ptr<h_t>();
    u = empty(y.sizes(), c10::CppTypeToScalarType<out_t>::value);
    Norm<h_t, out_t, kCentred>(rows, weight, bias)
        .forward(
            static_cast<acc_t>(eps),
            mean.mutable_data_ptr<acc_t>(),
            rstd.mutable_data_ptr<acc_t>(),
            u.mutable_data_ptr<out_t>(),
            [&](int64_t row) {
              const int64_t first = row * d;
              add_dropped(mask, y_data + first, residual_data + first, h_data + first, d, first);
            });
  });
  return {h, in_dtype(u, out), mean, rstd};
}

// (dh, e, dweight, dbias), of size 0 where not needed; e is, where a dtype is given.
template <bool kCentred>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& du,
    const OptionalTensor& dresidual,
    const Tensor& h,
    const OptionalTensor& mean,
    const Tensor& rstd,
    const Tensor& weight,
    std::optional<at::ScalarType> dtype,
    double p,
    const OptionalTensor& seed,
    bool need_dweight,
    bool need_dbias) {
  const auto stream = h.scalar_type(), narrow_type = dtype ? served(*dtype, stream) : stream;
  const Tensor rows = as_rows(h), rstds = rstd.contiguous();
  const OptionalTensor means = kCentred ? OptionalTensor(mean->contiguous()) : std::nullopt;
  const OptionalTensor more = dresidual ? OptionalTensor(in_dtype(*dresidual, stream)) : std::nullopt;
  const Dropout mask(p, seed, h.size(-1));
  const int64_t d = rows.size(1);
  const ParameterSums sums(rows, need_dweight, need_dbias);
  Tensor dh = empty(h.sizes(), stream), e = dtype ? empty(h.sizes(), narrow_type) : absent(narrow_type);
  dispatch_all(narrow_type, stream, du.scalar_type(), [&](auto narrow, auto wide, auto result) {
    using h_t = decltype(wide);
    using out_t = decltype(result);
    using acc_t = compute_t<h_t>;
    const Tensor dus = in_dtype(du, c10::CppTypeToScalarType<out_t>::value);
    const auto* more_data = data_or_null<h_t>(more);
    auto* dh_data = dh.mutable_data_ptr<h_t>();
    auto* e_data = e.mutable_data_ptr<decltype(narrow)>();
    Norm<h_t, out_t, kCentred>(rows, weight, std::nullopt)
        .backward(
            dus.const_data_ptr<out_t>(),
            data_or_null<acc_t>(means),
            rstds.const_data_ptr<acc_t>(),
            sums.slices,
            dh_data,
            sums.dweight,
            sums.dbias,
            [&](int64_t row) {
              const int64_t first = row * d;
              if (more_data != nullptr) {
                auto* row_data = dh_data + first;
                const auto sum = [](const auto& one, const auto& other) { return one + other; };
                at::vec::map2<h_t>(sum, row_data, row_data, more_data + first, d);
              }
              if (dtype) {
                write_dropped(mask, dh_data + first, e_data + first, d, first);
              }
            });
  });
  return {dh, dtype ? in_dtype(e, *dtype) : e, sums.total(sums.dweight), sums.total(sums.dbias)};
}

} // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(
    const Tensor& y,
    const Tensor& residual,
    const Tensor& weight,
    const OptionalTensor& bias,
    double eps,
    double p,
    const OptionalTensor& seed,
    bool centred) {
  return (centred ? forward<true> : forward<false>)(y, residual, weight, bias, eps, p, seed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(
    const Tensor& du,
    const OptionalTensor& dresidual,
    const Tensor& h,
    const OptionalTensor& mean,
    const Tensor& rstd,
    const Tensor& weight,
    std::optional<at::ScalarType> dtype,
    double p,
    const OptionalTensor& seed,
    bool need_dweight,
    bool need_dbias) {
  return (mean ? backward<true> : backward<false>)(
      du, dresidual, h, mean, rstd, weight, dtype, p, seed, need_dweight, need_dbias);
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(dropout_add_norm);
  PETL_KERNEL(dropout_add_norm_backward);
}
