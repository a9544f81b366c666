// What layer_norm, rms_norm and dropout_add_norm share: loops over rows, with a mean (kCentred) or without.
//
// scalar_t is the dtype of x, out_t that of y and dy, acc_t that of everything between them and of sums.
#pragma once

#include "rows.h"

namespace petl {

// So few rows that their column sums, formed before they join a slice's, stay exact.
constexpr int64_t kNormRows = 32;

template <typename scalar_t, typename out_t, bool kCentred>
struct Norm {
  using acc_t = compute_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

  Norm(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias)
      : d(rows.size(1)),
        x(rows.const_data_ptr<scalar_t>()),
        wide_weight(in_dtype(weight, compute_type(rows))),
        wide_bias(bias ? in_dtype(*bias, compute_type(rows)) : Tensor()),
        w(wide_weight.const_data_ptr<acc_t>()),
        v(bias ? wide_bias.const_data_ptr<acc_t>() : nullptr),
        blocks(rows.size(0), kNormRows),
        x_row(d),
        out_row(d) {}

  const acc_t* row_of_x(int64_t row) const { return converted(x + row * d, x_row.mine(), d); }

  // prepare(i) comes ahead of row i, and may write it.
  template <typename F>
  void forward(acc_t eps, acc_t* mean, acc_t* rstd, out_t* y, const F& prepare) const {
    blocks.parallel_for_each([&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        prepare(i);
        const acc_t* row = row_of_x(i);
        acc_t square = 0, centre = 0;
        if constexpr (kCentred) {
          const auto [offset, rest, variance] = row_moments(row, d);
          square = variance;
          mean[i] = centre = offset + rest;
        } else {
          square = sum_pairs<acc_t>(d, [](Vec v) { return std::pair(v * v, Vec(acc_t(0))); }, row).first / d;
        }
        rstd[i] = 1 / std::sqrt(square + eps);
        output(row, centre, rstd[i], y + i * d);
      }
    });
  }

  void from_statistics(const acc_t* mean, const acc_t* rstd, out_t* y) const {
    blocks.parallel_for_each([&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        output(row_of_x(i), kCentred ? mean[i] : 0, rstd[i], y + i * d);
      }
    });
  }

  // dx, dweight and dbias (partial sums, one a slice); each may be absent. finish(i) comes behind row i of dx.
  template <typename F>
  void backward(
      const out_t* dy,
      const acc_t* mean,
      const acc_t* rstd,
      const Slices& slices,
      scalar_t* dx,
      const OptionalTensor& dweight,
      const OptionalTensor& dbias,
      const F& finish) const {
    const Scratch<acc_t> dy_row(d), weight_sum(dweight ? d : 0), bias_sum(dbias ? d : 0);
    slices.parallel_for_each([&](int64_t slice, int64_t first, int64_t count) {
      std::fill_n(weight_sum.mine(), dweight ? d : 0, acc_t(0));
      std::fill_n(bias_sum.mine(), dbias ? d : 0, acc_t(0));
      for (int64_t i = first; i < first + count; ++i) {
        const acc_t* row = row_of_x(i);
        const acc_t* grad = converted(dy + i * d, dy_row.mine(), d);
        const acc_t centre = kCentred ? mean[i] : 0;
        if (dx != nullptr) {
          input_gradient(row, grad, centre, rstd[i], dx + i * d);
          finish(i);
        }
        if (dweight && dbias) {
          add_both_gradients(row, grad, centre, rstd[i], weight_sum.mine(), bias_sum.mine());
        } else if (dweight) {
          add_weight_gradient(row, grad, centre, rstd[i], weight_sum.mine());
        } else if (dbias) {
          accumulate(grad, bias_sum.mine(), d);
        }
      }
      if (dweight) {
        accumulate(weight_sum.mine(), slice_of<acc_t>(*dweight, slice), d);
      }
      if (dbias) {
        accumulate(bias_sum.mine(), slice_of<acc_t>(*dbias, slice), d);
      }
    });
  }

  // Not inlined, so that the same instructions make y in forward and again from the statistics.
  C10_NOINLINE void output(const acc_t* __restrict row, acc_t mean, acc_t rstd, out_t* y) const {
    acc_t* __restrict out = in_place_or(y, out_row.mine());
    if (v == nullptr) {
      for (int64_t j = 0; j < d; ++j) {
        out[j] = normalised(row[j], mean, rstd) * w[j];
      }
    } else {
      for (int64_t j = 0; j < d; ++j) {
        out[j] = normalised(row[j], mean, rstd) * w[j] + v[j];
      }
    }
    settle(out, y, d);
  }

  void input_gradient(const acc_t* __restrict row, const acc_t* __restrict dy, acc_t mean, acc_t rstd, scalar_t* dx)
      const {
    const auto terms = [means = Vec(mean), rstds = Vec(rstd)](Vec x, Vec dy, Vec w) {
      const Vec g = dy * w;
      return std::pair(g, g * normalised(x, means, rstds));
    };
    const auto [sum_g, sum_gn] = sum_pairs<acc_t>(d, terms, row, dy, w);
    const acc_t mean_g = kCentred ? sum_g / d : 0, mean_gn = sum_gn / d;
    acc_t* __restrict out = in_place_or(dx, out_row.mine());
    for (int64_t j = 0; j < d; ++j) {
      out[j] = (dy[j] * w[j] - mean_g - normalised(row[j], mean, rstd) * mean_gn) * rstd;
    }
    settle(out, dx, d);
  }

  void add_weight_gradient(
      const acc_t* __restrict row, const acc_t* __restrict dy, acc_t mean, acc_t rstd, acc_t* __restrict sum) const {
    for (int64_t j = 0; j < d; ++j) {
      sum[j] += dy[j] * normalised(row[j], mean, rstd);
    }
  }

  // In one pass: each alone waits for loads.
  void add_both_gradients(
      const acc_t* __restrict row,
      const acc_t* __restrict dy,
      acc_t mean,
      acc_t rstd,
      acc_t* __restrict weight_sum,
      acc_t* __restrict bias_sum) const {
    for (int64_t j = 0; j < d; ++j) {
      weight_sum[j] += dy[j] * normalised(row[j], mean, rstd);
      bias_sum[j] += dy[j];
    }
  }

  template <typename T>
  static T normalised(T value, T mean, T rstd) {
    return (kCentred ? value - mean : value) * rstd;
  }

  int64_t d;
  const scalar_t* x;
  Tensor wide_weight, wide_bias;
  const acc_t *w, *v;
  Blocks blocks;
  Scratch<acc_t> x_row, out_row;
};

// f(scalar_t(), out_t()): out_t is that of x, or the wide one for the outputs of wider parameters.
template <typename F>
void dispatch_norm(at::ScalarType x, at::ScalarType out, const F& f) {
  PETL_DISPATCH_FLOATING(x, "norm", [&] {
    if (x == out) {
      f(scalar_t(), scalar_t());
    } else {
      f(scalar_t(), compute_t<scalar_t>());
    }
  });
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// What comes ahead of or behind a row of a norm that stands alone.
constexpr auto nothing = [](int64_t) {};

// Where the gradients of a norm's parameters are summed: one part a slice of the rows, for each that is needed.
struct ParameterSums {
  ParameterSums(const Tensor& rows, bool need_dweight, bool need_dbias)
      : slices(Blocks(rows.size(0), kNormRows)),
        dweight(parts(rows, need_dweight)),
        dbias(parts(rows, need_dbias)),
        dtype(compute_type(rows)) {}

  OptionalTensor parts(const Tensor& rows, bool needed) const {
    return needed ? OptionalTensor(slices.partial_sums(rows, {rows.size(1)})) : std::nullopt;
  }

  // The gradient, of size 0 where it is not needed.
  Tensor total(const OptionalTensor& parts) const { return parts ? Slices::total(*parts) : absent(dtype); }

  Slices slices;
  OptionalTensor dweight, dbias;
  at::ScalarType dtype;
};

inline at::ScalarType output_type(const Tensor& x, const Tensor& weight) {
  return at::promote_types(x.scalar_type(), weight.scalar_type());
}

// y and one number a token, or two: rstd, and the mean with kCentred.
template <bool kCentred>
std::tuple<Tensor, OptionalTensor, Tensor> norm_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  const Tensor rows = as_rows(x);
  const auto out = output_type(x, weight);
  const auto tokens = x.sizes().slice(0, x.dim() - 1);
  Tensor rstd = empty(tokens, compute_type(x)), y;
  OptionalTensor mean = kCentred ? OptionalTensor(empty(tokens, compute_type(x))) : std::nullopt;
  dispatch_norm(x.scalar_type(), out, [&](auto scalar, auto result) {
    using acc_t = compute_t<decltype(scalar)>;
    y = empty(x.sizes(), c10::CppTypeToScalarType<decltype(result)>::value);
    Norm<decltype(scalar), decltype(result), kCentred>(rows, weight, bias)
        .forward(
            static_cast<acc_t>(eps),
            mean ? mean->template mutable_data_ptr<acc_t>() : nullptr,
            rstd.mutable_data_ptr<acc_t>(),
            y.mutable_data_ptr<decltype(result)>(),
            nothing);
  });
  return {in_dtype(y, out), mean, rstd};
}

template <bool kCentred>
Tensor norm_from_statistics(
    const Tensor& x,
    const OptionalTensor& mean,
    const Tensor& rstd,
    const Tensor& weight,
    const OptionalTensor& bias) {
  const Tensor rows = as_rows(x), rstds = rstd.contiguous();
  const OptionalTensor means = mean ? OptionalTensor(mean->contiguous()) : std::nullopt;
  const auto out = output_type(x, weight);
  Tensor y;
  dispatch_norm(x.scalar_type(), out, [&](auto scalar, auto result) {
    using acc_t = compute_t<decltype(scalar)>;
    y = empty(x.sizes(), c10::CppTypeToScalarType<decltype(result)>::value);
    Norm<decltype(scalar), decltype(result), kCentred>(rows, weight, bias)
        .from_statistics(
            data_or_null<acc_t>(means), rstds.const_data_ptr<acc_t>(), y.mutable_data_ptr<decltype(result)>());
  });
  return in_dtype(y, out);
}

// (dx, dweight, dbias), of size 0 where not needed.
template <bool kCentred>
std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& mean,
    const Tensor& rstd,
    const Tensor& weight,
    bool need_dx,
    bool need_dweight,
    bool need_dbias) {
  const Tensor rows = as_rows(x), rstds = rstd.contiguous();
  const OptionalTensor means = mean ? OptionalTensor(mean->contiguous()) : std::nullopt;
  const ParameterSums sums(rows, need_dweight, need_dbias);
  Tensor dx = need_dx ? empty(x.sizes(), x.scalar_type()) : absent(x.scalar_type());
  dispatch_norm(x.scalar_type(), dy.scalar_type(), [&](auto scalar, auto result) {
    using scalar_t = decltype(scalar);
    using out_t = decltype(result);
    using acc_t = compute_t<scalar_t>;
    const Tensor dys = in_dtype(dy, c10::CppTypeToScalarType<out_t>::value);
    Norm<scalar_t, out_t, kCentred>(rows, weight, std::nullopt)
        .backward(
            dys.const_data_ptr<out_t>(),
            data_or_null<acc_t>(means),
            rstds.const_data_ptr<acc_t>(),
            sums.slices,
            need_dx ? dx.mutable_data_ptr<scalar_t>() : nullptr,
            sums.dweight,
            sums.dbias,
            nothing);
  });
  return {dx, sums.total(sums.dweight), sums.total(sums.dbias)};
}

} // namespace petl
