// The formulas are in petl_kernels/ops/lora_linear.py.
//
// The adapters' products accumulate into their results, so no product of the full size is written twice. With dropout,
// the mask lives for one block of rows: drop(x) is formed in cache, multiplied, and forgotten.
#include "column_sum.h"
#include "kernel.h"
#include "philox.h"
#include "product.h"
#include "weight.h"

namespace petl {
namespace {

int64_t total_rank(at::TensorList a) {
  int64_t rank = 0;
  for (const Tensor& a_g : a) {
    rank += a_g.size(0);
  }
  return rank;
}

// [A_1; …; A_G] (Σ r_g, features) in dtype
Tensor stacked(at::TensorList a, at::ScalarType dtype) {
  if (a.size() == 1) {
    return in_dtype(a[0], dtype);
  }
  Tensor stack = empty({total_rank(a), a[0].size(1)}, dtype);
  auto* to = static_cast<std::byte*>(stack.mutable_data_ptr());
  for (const Tensor& a_g : a) {
    const Tensor values = in_dtype(a_g, dtype);
    std::memcpy(to, values.const_data_ptr(), values.nbytes());
    to += values.nbytes();
  }
  return stack;
}

// m (rows, columns), contiguous, transposed in memory.
Tensor transposed(const Tensor& m) {
  const int64_t rows = m.size(0), columns = m.size(1);
  Tensor result = empty({columns, rows}, m.scalar_type());
  PETL_DISPATCH_FLOATING(m.scalar_type(), "lora_linear_backward", [&] {
    const auto* from = m.const_data_ptr<scalar_t>();
    auto* to = result.mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[j * rows + i] = from[i * columns + j];
      }
    }
  });
  return result;
}

constexpr int64_t kFewRows = 512;

// out (rows, rank) = scale · x mᵀ, for x (rows, features) and m (rank, features), contiguous. Where the rows of x lie a
// multiple of 2 KiB apart, and so share sets of the first cache, the library is faster with a few ranks as the rows of
// the result: up to kFewRows rows of x, which are still in a cache (measured: bench/NOTES.md).
void skinny_product_out(const MatrixView& out, const Tensor& x, const Tensor& m, double scale) {
  const int64_t element = x.element_size();
  const bool alias = x.size(0) <= kFewRows && x.size(1) * element % 2048 == 0 && m.size(0) * element <= 32;
  if (alias && !widens(x.scalar_type())) {
    Tensor by_ranks = at::empty({m.size(0), x.size(0)}, x.options());
    at::addmm_out(by_ranks, by_ranks, m, x.t(), /*beta=*/0, scale);
    out.tensor().copy_(by_ranks.t());
  } else {
    product_out(out, x, MatrixView(m).t(), /*add=*/false, scale);
  }
}

// scale · leftᵀ right, a sum over tokens, in the dtype of sums
Tensor sum_over_tokens(const MatrixView& left, const Tensor& right, double scale) {
  Tensor sum = empty({left.columns, right.size(1)}, compute_type(right));
  product_out(sum, left.t(), right, /*add=*/false, scale);
  return sum;
}

// values ⊙= x, both (count, features)
template <typename T, typename Acc>
void multiply_rows(const T* x, int64_t count, int64_t features, Acc* __restrict values, Acc* row_buffer) {
  for (int64_t i = 0; i < count; ++i) {
    const Acc* row = converted(x + i * features, row_buffer, features);
    for (int64_t j = 0; j < features; ++j) {
      values[i * features + j] *= row[j];
    }
  }
}

// sum += left ⊙ right
template <typename T>
void add_product(const T* left, const T* right, int64_t count, T* __restrict sum) {
  for (int64_t j = 0; j < count; ++j) {
    sum[j] += left[j] * right[j];
  }
}

// s = drop(x) Aᵀ for the stacked A (rank, features).
Tensor dropped_product(const Tensor& x, const Tensor& a, const Dropout& dropout) {
  const int64_t rows = x.size(0), features = x.size(1), rank = a.size(0);
  Tensor s = empty({rows, rank}, x.scalar_type());
  const Tensor a_transposed = a.to(compute_type(x)).t();
  PETL_DISPATCH_FLOATING(x.scalar_type(), "lora_linear", [&] {
    using acc_t = compute_t<scalar_t>;
    const auto* x_data = x.const_data_ptr<scalar_t>();
    auto* s_data = s.mutable_data_ptr<scalar_t>();
    const Blocks blocks(rows);
    const Scratch<acc_t> dropped(blocks.block_rows * features), product(blocks.block_rows * rank), row_buffer(features);
    blocks.parallel_for_each([&](int64_t row, int64_t count) {
      dropout.factors(dropped.mine(), count * features, row * features);
      multiply_rows(x_data + row * features, count, features, dropped.mine(), row_buffer.mine());
      Tensor out = matrix(product.mine(), count, rank);
      at::mm_out(out, matrix(dropped.mine(), count, features), a_transposed);
      convert(product.mine(), s_data + row * rank, count * rank);
    });
  });
  return s;
}

// With t = ds A: dx += drop'(t), and returns dA = dsᵀ drop(x). Both need the same mask, formed once per block.
Tensor dropped_gradients(
    const Tensor& ds, const Tensor& x, const Tensor& a, const Dropout& dropout, const OptionalTensor& dx) {
  const int64_t rows = x.size(0), features = x.size(1), rank = a.size(0);
  const Tensor wide_a = a.to(compute_type(x)), wide_ds = ds.to(compute_type(x));
  const Blocks blocks(rows);
  const Slices slices(blocks);
  const Tensor da = slices.partial_sums(x, {rank, features});
  PETL_DISPATCH_FLOATING(x.scalar_type(), "lora_linear_backward", [&] {
    using acc_t = compute_t<scalar_t>;
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* ds_data = wide_ds.const_data_ptr<acc_t>();
    auto* dx_data = dx ? dx->mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t block_size = blocks.block_rows * features;
    const Scratch<acc_t> mask(block_size), work(block_size), row_buffer(features);
    slices.parallel_for_each([&](int64_t slice, int64_t row, int64_t count) {
      const Tensor ds_block = matrix(ds_data + row * rank, count, rank);
      Tensor block = matrix(work.mine(), count, features);
      dropout.factors(mask.mine(), count * features, row * features);
      std::copy(mask.mine(), mask.mine() + count * features, work.mine());
      multiply_rows(x_data + row * features, count, features, work.mine(), row_buffer.mine());
      matrix(slice_of<acc_t>(da, slice), rank, features).addmm_(ds_block.t(), block);
      if (dx_data == nullptr) {
        return;
      }
      at::mm_out(block, ds_block, wide_a);
      for (int64_t i = 0; i < count; ++i) {
        scalar_t* out = dx_data + (row + i) * features;
        acc_t* sum = row_buffer.mine();
        convert(out, sum, features);
        add_product(work.mine() + i * features, mask.mine() + i * features, features, sum);
        convert(sum, out, features);
      }
    });
  });
  return Slices::total(da);
}

} // namespace

std::tuple<std::vector<Tensor>, Tensor> lora_linear(
    const Tensor& x,
    at::TensorList parts,
    const c10::List<OptionalTensor>& biases,
    at::TensorList a,
    at::TensorList b,
    at::ArrayRef<double> scales,
    double dropout,
    const OptionalTensor& seed) {
  const Tensor rows = as_rows(x);
  const std::vector<Weight> weights = weights_with_in(parts, rows.size(1));
  const Tensor stacked_a = stacked(a, x.scalar_type());
  const Dropout drop(dropout, seed, x.size(-1));
  Tensor s;
  if (drop) {
    s = dropped_product(rows, stacked_a, drop);
  } else {
    s = empty({rows.size(0), stacked_a.size(0)}, x.scalar_type());
    skinny_product_out(s, rows, stacked_a, 1);
  }

  std::vector<Tensor> ys;
  ys.reserve(weights.size());
  int64_t first = 0;
  for (size_t g = 0; g < weights.size(); ++g) {
    const int64_t rank = a[g].size(0);
    Tensor y = project(rows, weights[g], biases.get(g));
    const Tensor b_g = in_dtype(b[g], x.scalar_type());
    product_out(y, MatrixView(s).columns_from(first, rank), MatrixView(b_g).t(), /*add=*/true, scales[g]);
    ys.push_back(with_sizes(y, with_features(x, weights[g].out)));
    first += rank;
  }
  return {ys, s};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward(
    at::TensorList dys,
    const Tensor& x,
    const Tensor& s,
    at::TensorList parts,
    at::TensorList a,
    at::TensorList b,
    at::ArrayRef<double> scales,
    double dropout,
    const OptionalTensor& seed,
    bool need_dx,
    const c10::List<bool>& need_dbias) {
  const auto dtype = x.scalar_type();
  const Tensor rows = as_rows(x);
  const std::vector<Weight> weights = weights_with_in(parts, rows.size(1));
  const Tensor stacked_a = stacked(a, dtype);
  const Tensor ds = empty({rows.size(0), total_rank(a)}, dtype);
  Tensor dx = need_dx ? empty(rows.sizes(), dtype) : absent(dtype);
  std::vector<Tensor> da, db, dbias;
  da.reserve(weights.size()), db.reserve(weights.size()), dbias.reserve(weights.size());

  int64_t first = 0;
  for (size_t g = 0; g < weights.size(); ++g) {
    const int64_t rank = a[g].size(0);
    const Tensor dy = as_rows(dys[g]);
    const Tensor b_transposed = transposed(in_dtype(b[g], dtype));
    skinny_product_out(MatrixView(ds).columns_from(first, rank), dy, b_transposed, scales[g]);
    // (sᵀ dy)ᵀ and not dyᵀ s: the libraries run the wide result faster than the narrow one.
    const Tensor db_transposed = sum_over_tokens(MatrixView(s).columns_from(first, rank), dy, scales[g]);
    db.push_back(in_dtype(transposed(db_transposed), b[g].scalar_type()));
    dbias.push_back(need_dbias.get(g) ? column_sum(dy) : absent(compute_type(x)));
    if (need_dx) {
      project_back_out(dx, dy, weights[g], /*add=*/g > 0);
    }
    first += rank;
  }

  const Dropout drop(dropout, seed, x.size(-1));
  Tensor stacked_da;
  if (drop) {
    stacked_da = dropped_gradients(ds, rows, stacked_a, drop, need_dx ? OptionalTensor(dx) : std::nullopt);
  } else {
    stacked_da = sum_over_tokens(ds, rows, 1);
    if (need_dx) {
      product_out(dx, ds, stacked_a, /*add=*/true);
    }
  }
  first = 0;
  for (const Tensor& a_g : a) {
    // A copy of its own: results of an op must not share memory.
    const Tensor part = stacked_da.narrow(0, first, a_g.size(0));
    da.push_back(in_dtype(part, a_g.scalar_type(), /*copy=*/true));
    first += a_g.size(0);
  }
  return {need_dx ? with_sizes(dx, x.sizes()) : dx, da, db, dbias};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(lora_linear);
  PETL_KERNEL(lora_linear_backward);
}
