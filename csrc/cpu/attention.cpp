// The formulas are in petl_kernels/ops/attention.py.
//
// A head of a batch row, or of a sentence in a packed row, is worked on in blocks of queries whose scores, over all its
// keys, stay in cache. Its keys are converted once into the dtype of sums, behind those of the prefix, in scratch that
// the thread's next head uses again. Products are the library's, in the dtype of sums: it rounds less than the inputs'
// own, and is faster than most processors' bf16.
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kernel.h"
#include "philox.h"

namespace petl {
namespace {

constexpr int64_t kBlockScores = 1 << 17, kMinRows = 16, kMaxRows = 256;

// x (B, H, L, D) with adjacent features.
Tensor with_adjacent_features(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

// An empty (B, H, L, D) over memory of shape (B, L, H, D).
Tensor like_heads(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
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

// The bias by distance: (H, 2R + 1), added to where key j of a row of scores is j + offset behind its query.
template <typename T>
class Distances {
 public:
  explicit Distances(const Tensor& table)
      : reach_(table.size(1) / 2), table_(table.to(c10::CppTypeToScalarType<T>::value).contiguous()) {}

  void add_to(T* s, int64_t count, int64_t h, int64_t offset) const {
    const T* of_head = table_.template const_data_ptr<T>() + h * (2 * reach_ + 1);
    const auto [low, high] = inner(count, offset);
    for (int64_t j = 0; j < low; ++j) {
      s[j] += of_head[0];
    }
    for (int64_t j = low; j < high; ++j) {
      s[j] += of_head[reach_ + offset + j];
    }
    for (int64_t j = high; j < count; ++j) {
      s[j] += of_head[2 * reach_];
    }
  }

  // sums (H, 2R + 1) += ds of one row, each at its distance
  void sum(const T* ds, int64_t count, int64_t h, int64_t offset, T* sums) const {
    T* __restrict of_head = sums + h * (2 * reach_ + 1);
    const auto [low, high] = inner(count, offset);
    of_head[0] += std::accumulate(ds, ds + low, T(0));
    for (int64_t j = low; j < high; ++j) {
      of_head[reach_ + offset + j] += ds[j];
    }
    of_head[2 * reach_] += std::accumulate(ds + high, ds + count, T(0));
  }

 private:
  // The keys at distances of -R to R; all others get what the nearer end gets.
  std::pair<int64_t, int64_t> inner(int64_t count, int64_t offset) const {
    const int64_t low = std::clamp<int64_t>(-reach_ - offset, 0, count);
    return {low, std::clamp<int64_t>(reach_ - offset + 1, low, count)};
  }

  int64_t reach_;
  Tensor table_;
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

// A row of the batch, or a sentence of a packed row: its queries and the keys that these see.
struct Sentence {
  int64_t b, first_query, queries, first_key, keys;
};

std::vector<int64_t> boundaries(const Tensor& cu, int64_t tokens) {
  const Tensor contiguous = cu.contiguous();
  const int32_t* data = contiguous.const_data_ptr<int32_t>();
  std::vector<int64_t> values(data, data + cu.numel());
  TORCH_CHECK(
      !values.empty() && values.front() == 0 && values.back() == tokens && std::is_sorted(values.begin(), values.end()),
      "attention: boundaries of sentences: expected numbers from 0 to ", tokens, " that do not fall");
  return values;
}

std::vector<Sentence> sentences_of(
    const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  std::vector<Sentence> sentences;
  if (!cu_seqlens_q) {
    for (int64_t b = 0; b < q.size(0); ++b) {
      sentences.push_back({b, 0, q.size(2), 0, k.size(2)});
    }
    return sentences;
  }
  const auto of_q = boundaries(*cu_seqlens_q, q.size(2)), of_k = boundaries(cu_seqlens_k.value(), k.size(2));
  TORCH_CHECK(of_q.size() == of_k.size(), "attention: cu_seqlens_q and cu_seqlens_k: expected equally many sentences");
  for (size_t i = 0; i + 1 < of_q.size(); ++i) {
    sentences.push_back({0, of_q[i], of_q[i + 1] - of_q[i], of_k[i], of_k[i + 1] - of_k[i]});
  }
  return sentences;
}

// The largest of one number of each sentence.
int64_t largest(const std::vector<Sentence>& sentences, int64_t Sentence::*number) {
  int64_t value = 0;
  for (const Sentence& sentence : sentences) {
    value = std::max(value, sentence.*number);
  }
  return value;
}

// What both directions read.
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
      const OptionalTensor& seed,
      const OptionalTensor& cu_seqlens_q,
      const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& distance_bias)
      : q(with_adjacent_features(q)),
        k(with_adjacent_features(k)),
        v(with_adjacent_features(v)),
        causal(causal),
        scale(scale),
        drop(dropout, seed, first_key(prefix_k) + in_whole_groups(k.size(2))),
        distance_bias(distance_bias),
        packed(cu_seqlens_q.has_value()),
        sentences(sentences_of(q, k, cu_seqlens_q, cu_seqlens_k)),
        heads(q.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        features(q.size(3)),
        prefix(prefix_k ? prefix_k->size(0) : 0),
        columns(prefix + largest(sentences, &Sentence::keys)),
        block_rows(std::min(
            std::clamp(kBlockScores / std::max<int64_t>(1, columns), kMinRows, kMaxRows),
            std::max<int64_t>(1, largest(sentences, &Sentence::queries)))) {
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

  // The row of the mask that query i has.
  int64_t mask_row(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * queries + i; }

  // In a row of the mask the keys begin where a group of counters does, behind the prefix.
  static int64_t in_whole_groups(int64_t columns) { return at::divup(columns, 32) * 32; }
  static int64_t first_key(const OptionalTensor& prefix_k) { return prefix_k ? in_whole_groups(prefix_k->size(0)) : 0; }

  Tensor q, k, v;
  bool causal;
  double scale;
  Dropout drop;
  OptionalTensor distance_bias;
  bool packed;
  std::vector<Sentence> sentences;
  int64_t heads, queries, keys, features, prefix;
  int64_t columns, block_rows; // the most that a sentence has, and that a block takes
  std::optional<Rows> mask_rows, bias_rows;
  Tensor wide_prefix_k, wide_prefix_v;
};

// f(h, sentence) for every head of every sentence, in parallel; with in_order, one thread takes all of a head. In a
// packed row, whose sentences differ in length, threads share heads and not sentences: each gets about as much.
template <typename F>
void for_each_head(const Problem& p, bool in_order, const F& worker) {
  const int64_t count = p.sentences.size(), units = in_order ? p.heads : p.heads * count;
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    // Worker threads do not inherit the caller's dispatch state (autograd off, inference mode).
    at::AutoDispatchBelowADInplaceOrView guard;
    auto f = worker();
    for (int64_t unit = begin; unit < end; ++unit) {
      if (in_order) {
        for (const Sentence& sentence : p.sentences) {
          f(unit, sentence);
        }
      } else if (p.packed) {
        f(unit / count, p.sentences[unit % count]);
      } else {
        f(unit % p.heads, p.sentences[unit / p.heads]);
      }
    }
  });
}

// A thread's buffers for one head of a sentence and one block of its queries.
template <typename T>
struct Work {
  using acc_t = compute_t<T>;

  explicit Work(const Problem& p)
      : p(p),
        options(at::dtype(c10::CppTypeToScalarType<acc_t>::value)),
        k(at::empty({p.columns, p.features}, options)),
        v(at::empty_like(k)),
        q(at::empty({p.block_rows, p.features}, options)),
        s(at::empty({p.block_rows, p.columns}, options)),
        out(at::empty_like(q)) {
    if (p.drop) {
      factors = at::empty_like(s);
    }
    if (p.distance_bias) {
      distances.emplace(*p.distance_bias);
    }
  }

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

  // The head whose blocks follow; its keys are read.
  void open(int64_t h_, const Sentence& sentence_) {
    h = h_, sentence = sentence_;
    columns = p.prefix + sentence.keys;
    const int64_t size = p.prefix * p.features;
    if (p.prefix > 0) {
      std::copy_n(data(p.wide_prefix_k) + h * size, size, data(k));
      std::copy_n(data(p.wide_prefix_v) + h * size, size, data(v));
    }
    read(p.k, sentence.b, h, sentence.first_key, sentence.keys, data(k) + size);
    read(p.v, sentence.b, h, sentence.first_key, sentence.keys, data(v) + size);
  }

  // The block starts at query `first` of the sentence and has at most block_rows, which see `seen` columns.
  void start(int64_t first_) {
    first = first_, count = std::min(p.block_rows, sentence.queries - first);
    seen = visible(first + count);
  }

  // How many columns the sentence's queries before `end` can see.
  int64_t visible(int64_t end) const {
    const int64_t keys = sentence.keys;
    return p.causal ? p.prefix + std::clamp<int64_t>(end + keys - sentence.queries, 0, keys) : columns;
  }

  int64_t row_of(int64_t i) const { return sentence.first_query + first + i; }
  // How far key 0 is behind query i of the block.
  int64_t offset(int64_t i) const { return sentence.queries - sentence.keys - first - i; }

  // Rows of block buffers are as far apart as the sentence has columns.
  acc_t* row_of_block(const Tensor& buffer, int64_t i) const { return data(buffer) + i * columns; }

  // The first count rows and seen columns of a block buffer, of k or of v.
  Tensor rows_of(const Tensor& buffer) const { return count == buffer.size(0) ? buffer : buffer.narrow(0, 0, count); }
  Tensor scores_of(const Tensor& buffer) const {
    const bool whole = count == buffer.size(0) && seen == p.columns;
    return whole ? buffer : buffer.as_strided({count, seen}, {columns, 1});
  }
  Tensor keys_of(const Tensor& buffer) const { return seen == p.columns ? buffer : buffer.narrow(0, 0, seen); }

  // s = P, and the log-sum-exp of each row by sink(row, lse).
  template <typename Sink>
  void probabilities(const Sink& sink) const {
    read(p.q, sentence.b, h, row_of(0), count, data(q));
    Tensor block = scores_of(s);
    at::addmm_out(block, block, rows_of(q), keys_of(k).t(), /*beta=*/0, /*alpha=*/p.scale);
    for (int64_t i = 0; i < count; ++i) {
      acc_t* row = row_of_block(s, i);
      acc_t* of_keys = row + p.prefix;
      const int64_t query = row_of(i), row_seen = visible(first + i + 1);
      if (p.bias_rows) {
        p.bias_rows->add_to(of_keys, row_seen - p.prefix, sentence.b, h, query);
      }
      if (distances) {
        distances->add_to(of_keys, row_seen - p.prefix, h, offset(i));
      }
      if (p.mask_rows) {
        p.mask_rows->add_to(of_keys, row_seen - p.prefix, sentence.b, h, query);
      }
      sink(query, softmax_row(row, row_seen));
      std::fill(row + row_seen, row + seen, acc_t(0));
    }
  }

  // The dropout factors of the block.
  void draw() const {
    const int64_t first_key = Problem::in_whole_groups(p.prefix) + sentence.first_key;
    for (int64_t i = 0; i < count; ++i) {
      acc_t* row = row_of_block(factors, i);
      const int64_t mask_row = p.mask_row(sentence.b, h, row_of(i));
      p.drop.probability_factors(row, p.prefix, mask_row, 0);
      p.drop.probability_factors(row + p.prefix, seen - p.prefix, mask_row, first_key);
    }
  }

  const Problem& p;
  at::TensorOptions options;
  Tensor k, v, q, s, out, factors;
  std::optional<Distances<acc_t>> distances;
  Sentence sentence{};
  int64_t h = 0, columns = 0, first = 0, count = 0, seen = 0;
};

template <typename T>
void forward(const Problem& p, const Tensor& o, const Tensor& lse) {
  using acc_t = compute_t<T>;
  acc_t* lse_data = lse.mutable_data_ptr<acc_t>();
  for_each_head(p, /*in_order=*/false, [&] {
    return [&, work = Work<T>(p)](int64_t h, const Sentence& sentence) mutable {
      work.open(h, sentence);
      for (int64_t first = 0; first < sentence.queries; first += p.block_rows) {
        work.start(first);
        acc_t* lse_of_head = lse_data + (sentence.b * p.heads + h) * p.queries;
        work.probabilities([&](int64_t query, acc_t value) { lse_of_head[query] = value; });
        Tensor block = work.scores_of(work.s);
        if (p.drop) {
          work.draw();
          block.mul_(work.scores_of(work.factors));
        }
        Tensor out = work.rows_of(work.out);
        at::mm_out(out, block, work.keys_of(work.v));
        work.write(o, sentence.b, h, work.row_of(0), work.count, work.data(work.out));
      }
    };
  });
}

struct Gradients {
  Tensor dq, dk, dv, dbias, dprefix_k, dprefix_v, ddistance_bias; // dprefix (H, P, D); from dbias on in that of sums
};

template <typename T>
struct BackwardWork : Work<T> {
  using acc_t = compute_t<T>;

  explicit BackwardWork(const Problem& p)
      : Work<T>(p), dk(at::empty_like(this->k)), dv(at::empty_like(dk)), ds(at::empty_like(this->s)),
        dout(at::empty_like(this->q)) {}

  // ds = P ⊙ (drop(ds) - delta), and s = drop(P), for one row of each
  void row(int64_t i, acc_t delta) const {
    acc_t* __restrict dropped = this->row_of_block(this->s, i);
    acc_t* __restrict to = this->row_of_block(ds, i);
    if (!this->p.drop) {
      for (int64_t j = 0; j < this->seen; ++j) {
        to[j] = dropped[j] * (to[j] - delta);
      }
      return;
    }
    const acc_t* __restrict factor = this->row_of_block(this->factors, i);
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
        this->data(dout) + i * features,
        this->data(this->out) + i * features,
        features);
  }

  Tensor dk, dv, ds, dout;
};

// dbias += dS of one block
template <typename T>
void add_to_bias(const BackwardWork<T>& work, const Tensor& dbias) {
  using acc_t = compute_t<T>;
  const Problem& p = work.p;
  const int64_t b = dbias.size(0) == 1 ? 0 : work.sentence.b;
  for (int64_t i = 0; i < work.count; ++i) {
    acc_t* to = work.data(dbias) + ((b * p.heads + work.h) * p.queries + work.row_of(i)) * p.keys;
    const acc_t* from = work.row_of_block(work.ds, i) + p.prefix;
    for (int64_t j = 0; j < work.seen - p.prefix; ++j) {
      to[j] += from[j];
    }
  }
}

// ddistance_bias += dS of one block
template <typename T>
void add_to_distances(const BackwardWork<T>& work, const Tensor& ddistance_bias) {
  for (int64_t i = 0; i < work.count; ++i) {
    const auto* of_keys = work.row_of_block(work.ds, i) + work.p.prefix;
    const int64_t keys = work.seen - work.p.prefix;
    work.distances->sum(of_keys, keys, work.h, work.offset(i), work.data(ddistance_bias));
  }
}

// The sums over the queries of one head, to where they belong.
template <typename T>
void settle_keys(const BackwardWork<T>& work, const Tensor& sums, const Tensor& grad, const Tensor& dprefix) {
  using acc_t = compute_t<T>;
  const Problem& p = work.p;
  const int64_t size = p.prefix * p.features;
  acc_t* from = work.data(sums);
  acc_t* of_prefix = work.data(dprefix) + work.h * size;
  for (int64_t j = 0; j < size; ++j) {
    of_prefix[j] += from[j];
  }
  work.write(grad, work.sentence.b, work.h, work.sentence.first_key, work.sentence.keys, from + size);
}

template <typename T>
void backward(const Problem& p, const Tensor& dout, const Tensor& o, const Gradients& to) {
  const bool distances = to.ddistance_bias.dim() == 2;
  const bool sums_over_batch = p.prefix > 0 || distances || (to.dbias.dim() == 4 && to.dbias.size(0) == 1);
  for_each_head(p, sums_over_batch, [&] {
    return [&, work = BackwardWork<T>(p)](int64_t h, const Sentence& sentence) mutable {
      work.open(h, sentence);
      for (const Tensor& sums : {work.dk, work.dv}) {
        std::fill_n(work.data(sums), work.columns * p.features, 0);
      }
      for (int64_t first = 0; first < sentence.queries; first += p.block_rows) {
        work.start(first);
        work.probabilities([](int64_t, auto) {});
        work.read(dout, sentence.b, h, work.row_of(0), work.count, work.data(work.dout));
        work.read(o, sentence.b, h, work.row_of(0), work.count, work.data(work.out));
        if (p.drop) {
          work.draw();
        }
        const Tensor k = work.keys_of(work.k), v = work.keys_of(work.v);
        const Tensor q = work.rows_of(work.q), dout_rows = work.rows_of(work.dout), dropped = work.scores_of(work.s);
        Tensor ds = work.scores_of(work.ds), out = work.rows_of(work.out);
        at::mm_out(ds, dout_rows, v.t());
        for (int64_t i = 0; i < work.count; ++i) {
          work.row(i, work.delta(i));
        }
        if (to.dbias.dim() == 4) {
          add_to_bias(work, to.dbias);
        }
        if (distances) {
          add_to_distances(work, to.ddistance_bias);
        }
        work.keys_of(work.dv).addmm_(dropped.t(), dout_rows);
        work.keys_of(work.dk).addmm_(ds.t(), q, /*beta=*/1, /*alpha=*/p.scale);
        at::addmm_out(out, out, ds, k, /*beta=*/0, /*alpha=*/p.scale);
        work.write(to.dq, sentence.b, h, work.row_of(0), work.count, work.data(work.out));
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
    const OptionalTensor& seed,
    const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& distance_bias) {
  const Problem problem(
      q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias);
  Tensor o = like_heads(q);
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(compute_type(q)));
  PETL_DISPATCH_FLOATING(q.scalar_type(), "attention", [&] { forward<scalar_t>(problem, o, lse); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
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
    bool need_dbias,
    const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& distance_bias,
    bool need_ddistance_bias) {
  const Problem problem(
      q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias);
  const auto sums = q.options().dtype(compute_type(q));
  const std::vector<int64_t> prefix{problem.heads, problem.prefix, problem.features};
  const Gradients grads{
      like_heads(q),
      like_heads(k),
      like_heads(v),
      need_dbias ? at::zeros(bias->sizes(), sums) : at::empty({0}, sums),
      at::zeros(prefix, sums),
      at::zeros(prefix, sums),
      need_ddistance_bias ? at::zeros(distance_bias->sizes(), sums) : at::empty({0}, sums)};
  PETL_DISPATCH_FLOATING(q.scalar_type(), "attention_backward", [&] {
    backward<scalar_t>(problem, with_adjacent_features(dout), with_adjacent_features(o), grads);
  });
  const auto as_given = [](const Tensor& dprefix) { return dprefix.transpose(0, 1).contiguous(); };
  return {
      grads.dq,
      grads.dk,
      grads.dv,
      grads.dbias,
      as_given(grads.dprefix_k),
      as_given(grads.dprefix_v),
      grads.ddistance_bias};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(attention);
  PETL_KERNEL(attention_backward);
}
