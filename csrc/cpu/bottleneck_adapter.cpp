// The formulas are in petl_kernels/ops/bottleneck_adapter.py.
//
// Everything between x and y happens on blocks of rows that stay in cache: LayerNorm, the two products, activation,
// residual. scalar_t is the dtype of x, product_t that of the products (bf16 where the processor multiplies it, else
// acc_t), acc_t that of everything between them and of sums.
#include "activations.h"
#include "kernel.h"
#include "rows.h"

namespace petl {
namespace {

// rows[i] += row
template <typename T>
void add_row(T* rows, int64_t count, int64_t columns, const T* row) {
  for (int64_t i = 0; row != nullptr && i < count; ++i) {
    accumulate(row, rows + i * columns, columns);
  }
}

// total (acc_t) += left right, through a block of the products' dtype when that is narrower.
template <typename P, typename Acc>
void add_matmul(const Tensor& left, const Tensor& right, P* buffer, Acc* total) {
  const int64_t rows = left.size(0), columns = right.size(1);
  if constexpr (std::is_same_v<P, Acc>) {
    matrix(total, rows, columns).addmm_(left, right);
  } else {
    Tensor product = matrix(buffer, rows, columns);
    at::mm_out(product, left, right);
    for (int64_t j = 0; j < rows * columns; ++j) {
      total[j] += static_cast<Acc>(buffer[j]);
    }
  }
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// The parameters as the blocks use them. With n = (x - mean) · rstd, the LayerNorm's weight and bias move into D:
//   z = (n ⊙ w + v) Dᵀ + d = n (D ⊙ w)ᵀ + (D v + d)
// so a row is only normalised, and the gradients of w, v and D all come from two small sums, M = dzᵀ n and Σ dz:
//   dD = M ⊙ w + (Σ dz) ⊗ v        dw = Σ_rows D ⊙ M        dv = (Σ dz) D
struct Parameters {
  Parameters(
      const Tensor& x,
      const OptionalTensor& ln_weight,
      const OptionalTensor& ln_bias,
      const Tensor& down,
      const OptionalTensor& down_bias,
      const Tensor& up,
      at::ScalarType product_type)
      : norm(ln_weight.has_value()),
        weight(widen(ln_weight, x)),
        bias(widen(ln_bias, x)),
        wide_down(*widen(down, x)),
        down((norm ? wide_down * *weight : wide_down).to(product_type)),
        up(up.to(x.scalar_type()).to(product_type).contiguous()),
        z_bias(widen(down_bias, x)) {
    if (bias) {
      z_bias = z_bias ? at::addmv(*z_bias, wide_down, *bias) : at::mv(wide_down, *bias);
    }
  }

  static OptionalTensor widen(const OptionalTensor& parameter, const Tensor& x) {
    return parameter ? OptionalTensor(parameter->to(compute_type(x)).contiguous()) : std::nullopt;
  }

  bool norm;
  OptionalTensor weight, bias;
  Tensor wide_down, down, up;
  OptionalTensor z_bias;
};

// From M to dD, in place, and to the gradients of the LayerNorm's parameters (dbias only where there is a bias).
template <typename T>
void unfold_norm(const Parameters& p, const Tensor& sum_dz, Tensor& m, Tensor& dweight, Tensor& dbias) {
  const int64_t rows = m.size(0), d = m.size(1);
  const T* __restrict weight = p.weight->const_data_ptr<T>();
  const T* dz = sum_dz.const_data_ptr<T>();
  T* __restrict dw = dweight.zero_().mutable_data_ptr<T>();
  T* __restrict dv = dbias.zero_().mutable_data_ptr<T>();
  for (int64_t k = 0; k < rows; ++k) {
    const T* __restrict down = p.wide_down.const_data_ptr<T>() + k * d;
    T* __restrict row = m.mutable_data_ptr<T>() + k * d;
    for (int64_t j = 0; j < d; ++j) {
      dw[j] += down[j] * row[j];
      row[j] *= weight[j];
    }
    if (p.bias) {
      const T* __restrict bias = p.bias->const_data_ptr<T>();
      for (int64_t j = 0; j < d; ++j) {
        dv[j] += down[j] * dz[k];
        row[j] += bias[j] * dz[k];
      }
    }
  }
}

// One call's blocks.
template <typename scalar_t, typename product_t>
struct Adapter {
  using acc_t = compute_t<scalar_t>;

  Adapter(const Parameters& p, int64_t rows, double eps, Activation activation, double scale)
      : p(p),
        d(p.up.size(0)),
        m(p.up.size(1)),
        blocks(rows),
        eps(static_cast<acc_t>(eps)),
        activation(activation),
        scale(static_cast<acc_t>(scale)),
        n_block(blocks.block_rows * d),
        z_block(blocks.block_rows * m),
        wide_z_block(blocks.block_rows * m),
        rstds(blocks.block_rows),
        row_a(std::max(d, m)),
        row_b(std::max(d, m)) {}

  // n for a block, in product_t (x itself without a LayerNorm).
  Tensor normalise(const scalar_t* x, int64_t count) const {
    if constexpr (std::is_same_v<scalar_t, product_t>) {
      if (!p.norm) {
        return matrix(x, count, d);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      product_t* n = n_block.mine() + i * d;
      if (p.norm) {
        const acc_t* row = converted(x + i * d, row_a.mine(), d);
        acc_t* normalised = in_place_or(n, row_b.mine());
        rstds.mine()[i] = normalise_row(row, normalised, d, eps);
        settle(normalised, n, d);
      } else {
        convert(x + i * d, n, d);
      }
    }
    return matrix(n_block.mine(), count, d);
  }

  // z for a block, in acc_t.
  acc_t* project_down(const Tensor& n) const {
    const int64_t count = n.size(0);
    Tensor z = matrix(z_block.mine(), count, m);
    at::mm_out(z, n, p.down.t());
    convert(z_block.mine(), wide_z_block.mine(), count * m);
    add_row(wide_z_block.mine(), count, m, data_or_null<acc_t>(p.z_bias));
    return wide_z_block.mine();
  }

  void forward(const Tensor& x, const Tensor& residual, const OptionalTensor& scaled_up_bias, Tensor& y) const {
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* residual_data = residual.const_data_ptr<scalar_t>();
    const auto* c_up = data_or_null<acc_t>(scaled_up_bias);
    auto* y_data = y.mutable_data_ptr<scalar_t>();

    blocks.parallel_for_each([&](int64_t first, int64_t count) {
      acc_t* z = project_down(normalise(x_data + first * d, count));
      activate(activation, z, count * m);
      convert(z, z_block.mine(), count * m);

      // The product accumulates into residual + scale · u, in y itself where the dtypes agree.
      scalar_t* y_rows = y_data + first * d;
      product_t* sum;
      if constexpr (std::is_same_v<scalar_t, product_t>) {
        sum = y_rows;
      } else {
        sum = n_block.mine();
      }
      for (int64_t i = 0; i < count; ++i) {
        add(residual_data + (first + i) * d, c_up, sum + i * d);
      }
      matrix(sum, count, d).addmm_(matrix(z_block.mine(), count, m), p.up.t(), 1, scale);
      if constexpr (!std::is_same_v<scalar_t, product_t>) {
        convert(sum, y_rows, count * d);
      }
    });
  }

  // to = from + bias for one row; no bias where it is null.
  template <typename From, typename To>
  void add(const From* from, const acc_t* bias, To* to) const {
    if (bias == nullptr) {
      return convert(from, to, d);
    }
    const acc_t* values = converted(from, row_a.mine(), d);
    acc_t* sum = in_place_or(to, row_b.mine());
    for (int64_t j = 0; j < d; ++j) {
      sum[j] = values[j] + bias[j];
    }
    settle(sum, to, d);
  }

  // values *= scale
  void multiply(acc_t* values, int64_t count) const {
    for (int64_t j = 0; scale != 1 && j < count; ++j) {
      values[j] *= scale;
    }
  }

  // Partial sums, one per slice: M = dzᵀ n, Σ dz, dUᵀ, Σ dy.
  struct Sums {
    Tensor m, dz, dup_transposed, dy;
  };

  void backward(
      const Tensor& dy,
      const Tensor& x,
      bool residual_is_x,
      bool has_up_bias,
      const Slices& slices,
      const Sums& sums,
      const OptionalTensor& dx) const {
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* dy_data = dy.const_data_ptr<scalar_t>();
    auto* dx_data = dx ? dx->mutable_data_ptr<scalar_t>() : nullptr;
    const Scratch<product_t> dy_block(std::is_same_v<scalar_t, product_t> ? 0 : blocks.block_rows * d);
    const Scratch<product_t> g_block(blocks.block_rows * d), active_block(blocks.block_rows * m), product(d * m);
    const Scratch<acc_t> dz_block(blocks.block_rows * m);

    slices.parallel_for_each([&](int64_t slice, int64_t first, int64_t count) {
      const scalar_t* dy_rows = dy_data + first * d;
      const Tensor dy_matrix = matrix(converted(dy_rows, dy_block.mine(), count * d), count, d);
      if (has_up_bias) {
        add_columns(dy_rows, count, d, slice_of<acc_t>(sums.dy, slice));
      }

      const Tensor n = normalise(x_data + first * d, count);
      const acc_t* z = project_down(n);
      acc_t* dz = dz_block.mine();
      std::copy(z, z + count * m, dz);
      activate(activation, dz, count * m);
      multiply(dz, count * m);
      convert(dz, active_block.mine(), count * m);
      const Tensor active = matrix(active_block.mine(), count, m);
      add_matmul(active.t(), dy_matrix, product.mine(), slice_of<acc_t>(sums.dup_transposed, slice));

      Tensor dz_matrix = matrix(z_block.mine(), count, m);
      at::mm_out(dz_matrix, dy_matrix, p.up);
      convert(z_block.mine(), dz, count * m);
      multiply(dz, count * m);
      activate_backward(activation, z, dz, count * m);
      add_columns(dz, count, m, slice_of<acc_t>(sums.dz, slice));
      convert(dz, z_block.mine(), count * m);
      add_matmul(dz_matrix.t(), n, product.mine(), slice_of<acc_t>(sums.m, slice));

      if (dx_data != nullptr) {
        Tensor g = matrix(g_block.mine(), count, d);
        at::mm_out(g, dz_matrix, p.down);
        input_gradient(
            g_block.mine(), n.const_data_ptr<product_t>(), residual_is_x ? dy_rows : nullptr, count, dx_data + first * d);
      }
    });
  }

  // total += Σ rows[i], in runs of a few rows, so that no running sum grows long.
  template <typename T>
  void add_columns(const T* rows, int64_t count, int64_t columns, acc_t* total) const {
    constexpr int64_t kRun = 32;
    acc_t* sum = row_b.mine();
    for (int64_t first = 0; first < count; first += kRun) {
      std::fill(sum, sum + columns, acc_t(0));
      for (int64_t i = first; i < std::min(count, first + kRun); ++i) {
        accumulate(converted(rows + i * columns, row_a.mine(), columns), sum, columns);
      }
      accumulate(sum, total, columns);
    }
  }

  // dx of a block from g = dz D and n; adds dy unless it is null.
  void input_gradient(const product_t* g, const product_t* n, const scalar_t* dy, int64_t count, scalar_t* dx) const {
    acc_t* grad = row_b.mine();
    for (int64_t i = 0; i < count; ++i) {
      convert(g + i * d, grad, d);
      if (p.norm) {
        normalise_row_backward(grad, converted(n + i * d, row_a.mine(), d), rstds.mine()[i], d);
      }
      if (dy != nullptr) {
        accumulate(converted(dy + i * d, row_a.mine(), d), grad, d);
      }
      convert(grad, dx + i * d, d);
    }
  }

  const Parameters& p;
  int64_t d, m;
  Blocks blocks;
  acc_t eps;
  Activation activation;
  acc_t scale;
  Scratch<product_t> n_block, z_block;
  Scratch<acc_t> wide_z_block, rstds, row_a, row_b;
};

bool multiplies_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported;
#else
  return false;
#endif
}

// f(scalar_t(), product_t()) for the dtype of x.
template <typename F>
void dispatch(at::ScalarType dtype, const F& f) {
  if (dtype == at::kBFloat16 && multiplies_bf16()) {
    return f(at::BFloat16(), at::BFloat16());
  }
  PETL_DISPATCH_FLOATING(dtype, "bottleneck_adapter", [&] { f(scalar_t(), compute_t<scalar_t>()); });
}

at::ScalarType product_type(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && multiplies_bf16() ? at::kBFloat16 : compute_type(x);
}

} // namespace

Tensor bottleneck_adapter(
    const Tensor& x,
    const OptionalTensor& residual,
    const OptionalTensor& ln_weight,
    const OptionalTensor& ln_bias,
    const Tensor& down,
    const OptionalTensor& down_bias,
    const Tensor& up,
    const OptionalTensor& up_bias,
    double eps,
    std::string_view activation_name,
    double scale) {
  const Activation activation = parse_activation(activation_name);
  const Tensor rows = as_rows(x), residual_rows = residual ? as_rows(*residual) : rows;
  const Parameters parameters(x, ln_weight, ln_bias, down, down_bias, up, product_type(x));
  OptionalTensor scaled_up_bias;
  if (up_bias) {
    scaled_up_bias = up_bias->to(compute_type(x)) * scale;
  }
  Tensor y = at::empty_like(rows);
  dispatch(x.scalar_type(), [&](auto scalar, auto product) {
    Adapter<decltype(scalar), decltype(product)>(parameters, rows.size(0), eps, activation, scale)
        .forward(rows, residual_rows, scaled_up_bias, y);
  });
  return y.view(x.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward(
    const Tensor& dy,
    const Tensor& x,
    bool residual_is_x,
    const OptionalTensor& ln_weight,
    const OptionalTensor& ln_bias,
    const Tensor& down,
    const OptionalTensor& down_bias,
    const Tensor& up,
    double eps,
    std::string_view activation_name,
    double scale,
    bool need_dx,
    bool has_up_bias) {
  const Activation activation = parse_activation(activation_name);
  const Tensor rows = as_rows(x), dy_rows = as_rows(dy);
  const int64_t d = rows.size(1), m = down.size(0);
  const Parameters parameters(x, ln_weight, ln_bias, down, down_bias, up, product_type(x));
  const Blocks blocks(rows.size(0));
  const Slices slices(blocks);
  const OptionalTensor dx = need_dx ? OptionalTensor(at::empty_like(rows)) : std::nullopt;
  Tensor sum_m = slices.partial_sums(x, {m, d}), sum_dz = slices.partial_sums(x, {m});
  Tensor sum_dup = slices.partial_sums(x, {m, d}), sum_dy = slices.partial_sums(x, {d});
  dispatch(x.scalar_type(), [&](auto scalar, auto product) {
    Adapter<decltype(scalar), decltype(product)>(parameters, rows.size(0), eps, activation, scale)
        .backward(dy_rows, rows, residual_is_x, has_up_bias, slices, {sum_m, sum_dz, sum_dup, sum_dy}, dx);
  });

  const auto absent = [&] { return at::empty({0}, sum_m.options()); };
  Tensor ddown = Slices::total(sum_m), dln_weight = absent(), dln_bias = absent();
  sum_dz = Slices::total(sum_dz);
  if (ln_weight) {
    dln_weight = at::empty({d}, sum_m.options());
    dln_bias = ln_bias ? at::empty({d}, sum_m.options()) : dln_bias;
    AT_DISPATCH_FLOATING_TYPES(sum_m.scalar_type(), "bottleneck_adapter_backward", [&] {
      unfold_norm<scalar_t>(parameters, sum_dz, ddown, dln_weight, dln_bias);
    });
    dln_weight = dln_weight.to(ln_weight->scalar_type());
    dln_bias = ln_bias ? dln_bias.to(ln_bias->scalar_type()) : dln_bias;
  }
  return {
      dx ? dx->view(x.sizes()) : at::empty({0}, x.options()),
      dln_weight,
      dln_bias,
      ddown.to(down.scalar_type()),
      down_bias ? sum_dz.to(down_bias->scalar_type()) : absent(),
      Slices::total(sum_dup).to(up.scalar_type()).t().contiguous(),
      has_up_bias ? Slices::total(sum_dy) * scale : absent()};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(bottleneck_adapter);
  PETL_KERNEL(bottleneck_adapter_backward);
}
