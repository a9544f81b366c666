// The formulas are in petl_kernels/ops/attention.py.
//
// A head is worked on in blocks of queries whose scores, over all keys, stay in cache. Its keys are converted once into
// the dtype of sums, behind those of the prefix, in scratch that the thread's next head uses again. Products are the
// library's, in the dtype of sums: it rounds less than the inputs' own, and is faster than most processors' bf16.
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <cmath>
#include <limits>

#include "kernels.h"
#include "philox.h"
#include "product.h"

namespace petl {
namespace {

constexpr int64_t kBlockScores = 1 << 17, kMinRows = 16, kMaxRows = 256;

// x (B, H, L, D) with adjacent features.
Tensor with_adjacent_features(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

// An empty (B, H, L, D) over memory of shape (B, L, H, D).
Tensor like_heads(const Tensor& x) {
  const int64_t row = x.size(1) * x.size(3);
  return Tensor(at::detail::empty_strided_cpu(x.sizes(), {x.size(2) * row, x.size(3), row, 1}, x.scalar_type()));
}

// One row of a tensor of shape (B or 1, H or 1, Lq or 1, Lk), which is broadcast.
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : tensor_(tensor) {
    for (int64_t i = 0; i < 3; ++i) {
      strides_[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
    }
  }

  c10::ScalarType dtype() const { return tensor_.scalar_type(); }

  // f(values, stride) of one row
  template <typename T, typename F>
  void with_row(int64_t b, int64_t h, int64_t i, const F& f) const {
    f(tensor_.const_data_ptr<T>() + b * strides_[0] + h * strides_[1] + i * strides_[2], tensor_.stride(3));
  }

  // s += row, or where a bool row is false: s = -inf
  template <typename Acc>
  void add_to(Acc* s, int64_t count, int64_t b, int64_t h, int64_t i) const {
    if (dtype() == at::kBool) {
      with_row<bool>(b, h, i, [&](const bool* row, int64_t stride) {
        for (int64_t j = 0; j < count; ++j) {
          s[j] = row[j * stride] ? s[j] : -std::numeric_limits<Acc>::infinity();
        }
      });
      return;
    }
    PETL_DISPATCH_FLOATING(dtype(), "attention", [&] {
      with_row<scalar_t>(b, h, i, [&](const scalar_t* row, int64_t stride) {
        if (stride == 1) {
          for (int64_t j = 0; j < count; ++j) {
            s[j] += static_cast<Acc>(row[j]);
          }
        } else {
          for (int64_t j = 0; j < count; ++j) {
            s[j] += static_cast<Acc>(row[j * stride]);
          }
        }
      });
    });
  }

 private:
  Tensor tensor_;
  int64_t strides_[3];
};

// s = softmax(s); returns its log-sum-exp, inf for a row of -inf, which becomes zeros.
template <typename T>
T softmax_row(T* s, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  if (count == 0) {
    return kInfinity;
  }
  const T largest = at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, s, count);
  if (largest == -kInfinity) {
    std::fill(s, s + count, T(0));
    return kInfinity;
  }
  const Vec offset(largest);
  at::vec::map<T>([&](Vec a) { return (a - offset).exp(); }, s, s, count);
  const T sum = at::vec::reduce_all<T>([](Vec a, Vec b) { return a + b; }, s, count);
  const Vec inverse(1 / sum);
  at::vec::map<T>([&](Vec a) { return a * inverse; }, s, s, count);
  return largest + std::log(sum);
}

// What both directions read, and how a block of scores comes about.
struct Problem {
  Problem(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const OptionalTensor& mask,
      const OptionalTensor& bias,
      const OptionalTensor& prefix_k,
      const OptionalTensor& prefix_v,
      bool causal,
      double scale,
      double dropout,
      const OptionalTensor& seed)
      : q(with_adjacent_features(q)),
        k(with_adjacent_features(k)),
        v(with_adjacent_features(v)),
        causal(causal),
        scale(scale),
        drop(dropout, seed),
        batch(q.size(0)),
        heads(q.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        features(q.size(3)),
        prefix(prefix_k ? prefix_k->size(0) : 0),
        columns(prefix + keys),
        block_rows(std::min(
            std::clamp(kBlockScores / std::max<int64_t>(1, columns), kMinRows, kMaxRows),
            std::max<int64_t>(1, queries))) {
    if (mask) {
      mask_rows.emplace(*mask);
    }
    if (bias) {
      bias_rows.emplace(*bias);
    }
    if (prefix > 0) {
      wide_prefix_k = heads_first(*prefix_k);
      wide_prefix_v = heads_first(*prefix_v);
    }
  }

  // (P, H, D) as contiguous (H, P, D), rounded as the keys are
  Tensor heads_first(const Tensor& p) const {
    return p.transpose(0, 1).to(q.scalar_type()).to(compute_type(q)).contiguous();
  }

  // How many columns the queries before `end` can see.
  int64_t visible(int64_t end) const {
    return causal ? prefix + std::clamp<int64_t>(end + keys - queries, 0, keys) : columns;
  }

  int64_t first_probability(int64_t b, int64_t h, int64_t i) const {
    return ((b * heads + h) * queries + i) * columns;
  }

  Tensor q, k, v;
  bool causal;
  double scale;
  Dropout drop;
  int64_t batch, heads, queries, keys, features, prefix, columns, block_rows;
  std::optional<Rows> mask_rows, bias_rows;
  Tensor wide_prefix_k, wide_prefix_v;
};

// f(h, b) for every head of the batch, in parallel over heads; with in_order, one thread takes all of a head's batch.
template <typename F>
void for_each_head(const Problem& p, bool in_order, const F& worker) {
  const int64_t units = in_order ? p.heads : p.heads * p.batch;
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    // Worker threads do not inherit the caller's dispatch state (autograd off, inference mode).
    at::AutoDispatchBelowADInplaceOrView guard;
    auto f = worker();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t h = unit % p.heads;
      if (!in_order) {
        f(h, unit / p.heads);
        continue;
      }
      for (int64_t b = 0; b < p.batch; ++b) {
        f(h, b);
      }
    }
  });
}

// A thread's buffers for one head and one block of its queries.
template <typename T>
struct Work {
  using acc_t = compute_t<T>;

  explicit Work(const Problem& p)
      : p(p),
        keys_size(piece(p.columns * p.features)),
        rows_size(piece(p.block_rows * p.features)),
        scores_size(piece(p.block_rows * p.columns)),
        memory(2 * keys_size + 2 * rows_size + (p.drop ? 2 : 1) * scores_size),
        k(memory.data()),
        v(k + keys_size),
        q(v + keys_size),
        out(q + rows_size),
        s(out + rows_size),
        factors(s + scores_size) {}

  // Each buffer begins where a line of the cache does.
  static int64_t piece(int64_t count) { return at::divup(count, 16) * 16; }

  static acc_t* data(const Tensor& tensor) { return tensor.template mutable_data_ptr<acc_t>(); }

  // Rows [first, first + count) of head (b, h) of x, as sums are kept.
  void read(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t count, acc_t* to) const {
    const T* from = x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1) + first * x.stride(2);
    for (int64_t i = 0; i < count; ++i) {
      convert(from + i * x.stride(2), to + i * p.features, p.features);
    }
  }

  void write(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t count, const acc_t* from) const {
    T* to = x.mutable_data_ptr<T>() + b * x.stride(0) + h * x.stride(1) + first * x.stride(2);
    for (int64_t i = 0; i < count; ++i) {
      convert(from + i * p.features, to + i * x.stride(2), p.features);
    }
  }

  void read_keys(int64_t b, int64_t h) const {
    const int64_t size = p.prefix * p.features;
    if (p.prefix > 0) {
      std::copy_n(data(p.wide_prefix_k) + h * size, size, k);
      std::copy_n(data(p.wide_prefix_v) + h * size, size, v);
    }
    read(p.k, b, h, 0, p.keys, k + size);
    read(p.v, b, h, 0, p.keys, v + size);
  }

  // The block starts at query `first` and has `count` of them, which see `seen` columns.
  void start(int64_t b_, int64_t h_, int64_t first_, int64_t count_) {
    b = b_, h = h_, first = first_, count = count_;
    seen = p.visible(first + count);
  }

  static MatrixView view(const acc_t* buffer, int64_t rows, int64_t columns, int64_t stride) {
    return {buffer, c10::CppTypeToScalarType<acc_t>::value, rows, columns, stride, 1};
  }

  // The first count rows and seen columns of a block buffer, of k or of v.
  MatrixView rows_of(const acc_t* buffer) const { return view(buffer, count, p.features, p.features); }
  MatrixView scores_of(const acc_t* buffer) const { return view(buffer, count, seen, p.columns); }
  MatrixView keys_of(const acc_t* buffer) const { return view(buffer, seen, p.features, p.features); }

  // The operands of products, made again where a block has another size than the one before.
  bool cut() {
    if (count == cut_count && seen == cut_seen) {
      return false;
    }
    cut_count = count, cut_seen = seen;
    q_rows = rows_of(q).tensor(), out_rows = rows_of(out).tensor(), scores = scores_of(s).tensor();
    k_transposed = keys_of(k).t().tensor(), v_keys = keys_of(v).tensor();
    return true;
  }

  // s = P, and the log-sum-exp of each row by sink(row, lse). After cut().
  template <typename Sink>
  void probabilities(const Sink& sink) {
    read(p.q, b, h, first, count, q);
    at::cpu::addmm_out(scores, scores, q_rows, k_transposed, /*beta=*/0, /*alpha=*/p.scale);
    for (int64_t i = 0; i < count; ++i) {
      acc_t* row = s + i * p.columns;
      acc_t* of_keys = row + p.prefix;
      const int64_t query = first + i, row_seen = p.visible(query + 1);
      if (p.bias_rows) {
        p.bias_rows->add_to(of_keys, row_seen - p.prefix, b, h, query);
      }
      if (p.mask_rows) {
        p.mask_rows->add_to(of_keys, row_seen - p.prefix, b, h, query);
      }
      sink(query, softmax_row(row, row_seen));
      std::fill(row + row_seen, row + seen, acc_t(0));
    }
  }

  // The dropout factors of the block.
  void draw() const {
    for (int64_t i = 0; i < count; ++i) {
      p.drop.factors(factors + i * p.columns, seen, p.first_probability(b, h, first + i));
    }
  }

  const Problem& p;
  int64_t keys_size, rows_size, scores_size;
  Memory<acc_t> memory;
  acc_t *k, *v, *q, *out, *s, *factors;
  Tensor q_rows, out_rows, scores, k_transposed, v_keys;
  int64_t cut_count = -1, cut_seen = -1;
  int64_t b = 0, h = 0, first = 0, count = 0, seen = 0;
};

template <typename T>
void forward(const Problem& p, const Tensor& o, const Tensor& lse) {
  using acc_t = compute_t<T>;
  acc_t* lse_data = lse.mutable_data_ptr<acc_t>();
  for_each_head(p, /*in_order=*/false, [&] {
    return [&, work = Work<T>(p)](int64_t h, int64_t b) mutable {
      work.read_keys(b, h);
      for (int64_t first = 0; first < p.queries; first += p.block_rows) {
        work.start(b, h, first, std::min(p.block_rows, p.queries - first));
        acc_t* lse_of_head = lse_data + (b * p.heads + h) * p.queries;
        work.cut();
        work.probabilities([&](int64_t query, acc_t value) { lse_of_head[query] = value; });
        if (p.drop) {
          work.draw();
          work.scores.mul_(work.scores_of(work.factors).tensor());
        }
        at::cpu::mm_out(work.out_rows, work.scores, work.v_keys);
        work.write(o, b, h, first, work.count, work.out);
      }
    };
  });
}

struct Gradients {
  Tensor dq, dk, dv, dbias, dprefix_k, dprefix_v; // dprefix (H, P, D) and dbias in the dtype of sums
};

template <typename T>
struct BackwardWork : Work<T> {
  using acc_t = compute_t<T>;

  explicit BackwardWork(const Problem& p)
      : Work<T>(p),
        gradients(2 * this->keys_size + this->rows_size + this->scores_size),
        dk(gradients.data()),
        dv(dk + this->keys_size),
        dout(dv + this->keys_size),
        ds(dout + this->rows_size) {}

  void cut() {
    if (!Work<T>::cut()) {
      return;
    }
    k_keys = this->keys_of(this->k).tensor(), v_transposed = this->keys_of(this->v).t().tensor();
    dk_keys = this->keys_of(dk).tensor(), dv_keys = this->keys_of(dv).tensor();
    dout_rows = this->rows_of(dout).tensor(), dscores = this->scores_of(ds).tensor();
    dscores_transposed = this->scores_of(ds).t().tensor();
    scores_transposed = this->scores_of(this->s).t().tensor();
  }

  // ds = P ⊙ (drop(ds) - delta), and s = drop(P), for one row of each
  void row(int64_t i, acc_t delta) const {
    acc_t* __restrict dropped = this->s + i * this->p.columns;
    acc_t* __restrict to = ds + i * this->p.columns;
    if (!this->p.drop) {
      for (int64_t j = 0; j < this->seen; ++j) {
        to[j] = dropped[j] * (to[j] - delta);
      }
      return;
    }
    const acc_t* __restrict factor = this->factors + i * this->p.columns;
    for (int64_t j = 0; j < this->seen; ++j) {
      to[j] = dropped[j] * (to[j] * factor[j] - delta);
      dropped[j] *= factor[j];
    }
  }

  // Σ do ⊙ o for row i of the block; the row of o is in out.
  acc_t delta(int64_t i) const {
    using Vec = at::vec::Vectorized<acc_t>;
    const int64_t features = this->p.features;
    return at::vec::map2_reduce_all<acc_t>(
        [](Vec x, Vec y) { return x * y; },
        [](Vec x, Vec y) { return x + y; },
        dout + i * features,
        this->out + i * features,
        features);
  }

  Memory<acc_t> gradients;
  acc_t *dk, *dv, *dout, *ds;
  Tensor k_keys, v_transposed, dk_keys, dv_keys, dout_rows, dscores, dscores_transposed, scores_transposed;
};

// dbias += dS of one block
template <typename T>
void add_to_bias(const BackwardWork<T>& work, const Tensor& dbias) {
  using acc_t = compute_t<T>;
  const Problem& p = work.p;
  const int64_t b = dbias.size(0) == 1 ? 0 : work.b;
  for (int64_t i = 0; i < work.count; ++i) {
    acc_t* to = work.data(dbias) + ((b * p.heads + work.h) * p.queries + work.first + i) * p.keys;
    const acc_t* from = work.ds + i * p.columns + p.prefix;
    for (int64_t j = 0; j < work.seen - p.prefix; ++j) {
      to[j] += from[j];
    }
  }
}

// The sums over the queries of one head, to where they belong.
template <typename T>
void settle_keys(
    const BackwardWork<T>& work, const compute_t<T>* from, const Tensor& grad, const Tensor& dprefix) {
  using acc_t = compute_t<T>;
  const Problem& p = work.p;
  const int64_t size = p.prefix * p.features;
  acc_t* of_prefix = work.data(dprefix) + work.h * size;
  for (int64_t j = 0; j < size; ++j) {
    of_prefix[j] += from[j];
  }
  work.write(grad, work.b, work.h, 0, p.keys, from + size);
}

template <typename T>
void backward(const Problem& p, const Tensor& dout, const Tensor& o, const Gradients& to) {
  const bool sums_over_batch = p.prefix > 0 || (to.dbias.dim() == 4 && to.dbias.size(0) == 1);
  for_each_head(p, sums_over_batch, [&] {
    return [&, work = BackwardWork<T>(p)](int64_t h, int64_t b) mutable {
      work.read_keys(b, h);
      std::fill_n(work.dk, p.columns * p.features, compute_t<T>(0));
      std::fill_n(work.dv, p.columns * p.features, compute_t<T>(0));
      work.start(b, h, 0, 0);
      for (int64_t first = 0; first < p.queries; first += p.block_rows) {
        work.start(b, h, first, std::min(p.block_rows, p.queries - first));
        work.cut();
        work.probabilities([](int64_t, auto) {});
        work.read(dout, b, h, first, work.count, work.dout);
        work.read(o, b, h, first, work.count, work.out);
        if (p.drop) {
          work.draw();
        }
        at::cpu::mm_out(work.dscores, work.dout_rows, work.v_transposed);
        for (int64_t i = 0; i < work.count; ++i) {
          work.row(i, work.delta(i));
        }
        if (to.dbias.dim() == 4) {
          add_to_bias(work, to.dbias);
        }
        at::cpu::addmm_(work.dv_keys, work.scores_transposed, work.dout_rows);
        at::cpu::addmm_(work.dk_keys, work.dscores_transposed, work.q_rows, /*beta=*/1, /*alpha=*/p.scale);
        at::cpu::addmm_out(work.out_rows, work.out_rows, work.dscores, work.k_keys, /*beta=*/0, /*alpha=*/p.scale);
        work.write(to.dq, b, h, first, work.count, work.out);
      }
      settle_keys(work, work.dk, to.dk, to.dprefix_k);
      settle_keys(work, work.dv, to.dv, to.dprefix_v);
    };
  });
}

} // namespace

std::tuple<Tensor, Tensor> attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& mask,
    const OptionalTensor& bias,
    const OptionalTensor& prefix_k,
    const OptionalTensor& prefix_v,
    bool causal,
    double scale,
    double dropout,
    const OptionalTensor& seed) {
  const Problem problem(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed);
  Tensor o = like_heads(q);
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, compute_type(q));
  PETL_DISPATCH_FLOATING(q.scalar_type(), "attention", [&] { forward<scalar_t>(problem, o, lse); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& o,
    const Tensor& /*lse*/,  // a block has whole rows: their softmax is exact even where an additive mask hides all keys
    const OptionalTensor& mask,
    const OptionalTensor& bias,
    const OptionalTensor& prefix_k,
    const OptionalTensor& prefix_v,
    bool causal,
    double scale,
    double dropout,
    const OptionalTensor& seed,
    bool need_dbias) {
  const Problem problem(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed);
  const auto sums = compute_type(q);
  const int64_t prefix[] = {problem.heads, problem.prefix, problem.features};
  const Gradients grads{
      like_heads(q),
      like_heads(k),
      like_heads(v),
      need_dbias ? zeros(bias->sizes(), sums) : absent(sums),
      zeros(prefix, sums),
      zeros(prefix, sums)};
  PETL_DISPATCH_FLOATING(q.scalar_type(), "attention_backward", [&] {
    backward<scalar_t>(problem, with_adjacent_features(dout), with_adjacent_features(o), grads);
  });
  const auto as_given = [&](const Tensor& dprefix) {
    return problem.prefix > 0 ? dprefix.transpose(0, 1).contiguous()
                              : empty({0, problem.heads, problem.features}, sums);
  };
  return {grads.dq, grads.dk, grads.dv, grads.dbias, as_given(grads.dprefix_k), as_given(grads.dprefix_v)};
}

} // namespace petl
