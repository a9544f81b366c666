// What linear_cross_entropy by words does between its products, a row at a time: petl_kernels/ops/loss_by_words.py has
// the formulas, and why m rises so rarely.
#include "exponential.h"
#include "kernel.h"
#include "rows.h"
#include "shared.h"

namespace petl {
namespace {

// Columns at a time: few enough to stay in the first cache in the dtype of sums.
constexpr int64_t kColumns = 1024;

template <typename T>
struct State {
  explicit State(const Tensor& state)
      : top(state.mutable_data_ptr<T>()),
        rest(top + state.size(1)),
        label_logit(rest + state.size(1)),
        word_logits(label_logit + state.size(1)) {}

  T *top, *rest, *label_logit, *word_logits;
};

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// f(columns from first, count) for a row of d columns.
template <typename F>
void for_each_block(int64_t d, const F& f) {
  for (int64_t first = 0; first < d; first += kColumns) {
    f(first, std::min(kColumns, d - first));
  }
}

// E of one block of words.
template <typename scalar_t>
class Words {
 public:
  using acc_t = compute_t<scalar_t>;

  Words(int64_t words, int64_t d, bool fresh, bool store) : words_(words), d_(d), fresh_(fresh), store_(store) {}

  // label: its place in the block, which may be none. total: the row of O, or null.
  void operator()(scalar_t* logits, int64_t label, acc_t* total, acc_t& top, acc_t& rest) const {
    constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity(), kOff = -kInfinity;
    if (label >= 0 && label < words_) {
      logits[label] = static_cast<scalar_t>(kOff);
    }
    const acc_t largest = maximum(logits);
    if (!(largest < kInfinity)) {  // inf or NaN, of which the fast exp makes numbers
      top = std::numeric_limits<acc_t>::quiet_NaN();
    } else if (fresh_) {
      top = largest > top ? largest : top;
    } else if (largest > top + static_cast<acc_t>(kRise)) {
      rise(largest, total, top, rest);
    }
    rest += static_cast<acc_t>(exponentials(logits, top == kOff ? acc_t(0) : top));
  }

 private:
  void rise(acc_t to, acc_t* total, acc_t& top, acc_t& rest) const {
    const acc_t factor = std::exp(top - to);
    top = to;
    rest *= factor;
    for (int64_t j = 0; total != nullptr && j < d_; ++j) {
      total[j] *= factor;
    }
  }

  acc_t maximum(const scalar_t* logits) const {
    acc_t top = -std::numeric_limits<acc_t>::infinity(), buffer[kColumns];
    for_each_block(words_, [&](int64_t first, int64_t count) {
      const acc_t* z = converted(logits + first, buffer, count);
      const auto larger = [](Vec<acc_t> a, Vec<acc_t> b) { return at::vec::maximum(a, b); };
      const acc_t block_top = at::vec::reduce_all<acc_t>(larger, z, count);
      top = block_top > top || std::isnan(block_top) ? block_top : top;
    });
    return top;
  }

  // E in place of the logits, and their sum.
  double exponentials(scalar_t* logits, acc_t origin) const {
    alignas(64) acc_t buffer[kColumns];
    double sum = 0;
    for_each_block(words_, [&](int64_t first, int64_t count) {
      const acc_t* z = converted(logits + first, buffer, count);
      acc_t* e = in_place_or(logits + first, buffer);
      sum += sum_of_exponentials(z, e, count, Vec<acc_t>(origin));
      if (store_) {
        settle(e, logits + first, count);
      }
    });
    return sum;
  }

  static acc_t sum_of_exponentials(const acc_t* z, acc_t* e, int64_t count, Vec<acc_t> origin) {
    constexpr int64_t kLanes = Vec<acc_t>::size();
    Vec<acc_t> sums(0);
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      const Vec<acc_t> value = exponential<scalar_t>(Vec<acc_t>::loadu(z + j) - origin);
      value.store(e + j);
      sums = sums + value;
    }
    if (j < count) {
      const Vec<acc_t> value = exponential<scalar_t>(Vec<acc_t>::loadu(z + j, count - j) - origin);
      value.store(e + j, count - j);
      sums = sums + Vec<acc_t>::set(Vec<acc_t>(0), value, count - j);
    }
    return at::vec::vec_reduce_all<acc_t>([](Vec<acc_t> a, Vec<acc_t> b) { return a + b; }, sums);
  }

  int64_t words_, d_;
  bool fresh_, store_;
};

} // namespace

Tensor linear_cross_entropy_begin(
    const Tensor& rows, const Tensor& weight, const Tensor& labels, const OptionalTensor& word_sum) {
  const int64_t count = rows.size(0), d = rows.size(1);
  Tensor made = zeros({4, count}, compute_type(rows));
  const Tensor label_rows = labels.contiguous();
  PETL_DISPATCH_FLOATING(rows.scalar_type(), "linear_cross_entropy_begin", [&] {
    using acc_t = compute_t<scalar_t>;
    const State<acc_t> state(made);
    const scalar_t *h = rows.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    const acc_t* sum = data_or_null<acc_t>(word_sum);
    const int64_t* label = label_rows.const_data_ptr<int64_t>();
    const int64_t stride = rows.stride(0), word_stride = weight.stride(0);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      acc_t left[kColumns], right[kColumns];
      for (int64_t row = begin; row < end; ++row) {
        for_each_block(d, [&](int64_t first, int64_t columns) {
          const acc_t* x = converted(h + row * stride + first, left, columns);
          const acc_t* y = converted(w + label[row] * word_stride + first, right, columns);
          using Vec = at::vec::Vectorized<acc_t>;
          const auto terms = [](Vec x, Vec y, Vec sum) { return std::pair(x * y, x * sum); };
          // Without sums the second number is not read.
          const auto [of_label, of_words] = sum_pairs<acc_t>(columns, terms, x, y, sum == nullptr ? y : sum + first);
          state.label_logit[row] += of_label;
          state.word_logits[row] += of_words;
        });
        state.top[row] = state.label_logit[row];
      }
    });
  });
  return made;
}

void linear_cross_entropy_words(
    const Tensor& logits,
    const Tensor& labels,
    int64_t first,
    const Tensor& state,
    const OptionalTensor& total,
    bool fresh) {
  const int64_t rows = logits.size(0), words = logits.size(1);
  const Tensor label_rows = labels.contiguous();
  PETL_DISPATCH_FLOATING(logits.scalar_type(), "linear_cross_entropy_words", [&] {
    using acc_t = compute_t<scalar_t>;
    const State<acc_t> of(state);
    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
    acc_t* sums = total ? total->mutable_data_ptr<acc_t>() : nullptr;
    const int64_t d = total ? total->size(1) : 0, stride = logits.stride(0);
    const int64_t* label = label_rows.const_data_ptr<int64_t>();
    const Words<scalar_t> pass(words, d, fresh, sums != nullptr);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        acc_t* sum = sums == nullptr ? nullptr : sums + row * d;
        pass(data + row * stride, label[row] - first, sum, of.top[row], of.rest[row]);
      }
    });
  });
}

Tensor linear_cross_entropy_end(
    const Tensor& weight,
    const Tensor& labels,
    const Tensor& state,
    const OptionalTensor& total,
    const OptionalTensor& word_sum,
    double label_weight,
    double word_weight,
    const OptionalTensor& dlosses,
    const OptionalTensor& out) {
  const int64_t rows = labels.size(0), d = weight.size(1), words = weight.size(0);
  Tensor made = empty({rows}, state.scalar_type());
  const Tensor label_rows = labels.contiguous();
  PETL_DISPATCH_FLOATING(weight.scalar_type(), "linear_cross_entropy_end", [&] {
    using acc_t = compute_t<scalar_t>;
    const State<acc_t> of(state);
    acc_t* losses = made.mutable_data_ptr<acc_t>();
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    scalar_t* gradients = out ? out->mutable_data_ptr<scalar_t>() : nullptr;
    const acc_t *o = data_or_null<acc_t>(total), *sum = data_or_null<acc_t>(word_sum);
    const acc_t* dloss = data_or_null<acc_t>(dlosses);
    const int64_t* label = label_rows.const_data_ptr<int64_t>();
    const int64_t word_stride = weight.stride(0);
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      acc_t values[kColumns], dh[kColumns];
      for (int64_t row = begin; row < end; ++row) {
        const acc_t rest = of.rest[row], label_part = of.label_logit[row] - of.top[row];
        const acc_t both = rest + std::exp(label_part), share = dloss == nullptr ? acc_t(1) : dloss[row];
        double loss = std::log(static_cast<double>(both)) - label_weight * static_cast<double>(label_part);
        if (sum != nullptr) {
          loss -= word_weight * (static_cast<double>(of.word_logits[row]) - words * static_cast<double>(of.top[row]));
        }
        losses[row] = static_cast<acc_t>(loss);
        // p_y - a, without the difference of two numbers near 1
        const acc_t factor = static_cast<acc_t>((1 - label_weight) - static_cast<double>(rest) / both) * share;
        const acc_t scale = share / both, smoothing = static_cast<acc_t>(word_weight) * share;
        for_each_block(gradients == nullptr ? 0 : d, [&](int64_t first, int64_t columns) {
          const acc_t* word = converted(w + label[row] * word_stride + first, values, columns);
          const acc_t* of_words = o + row * d + first;
          for (int64_t j = 0; j < columns; ++j) {
            dh[j] = of_words[j] * scale + factor * word[j];
          }
          for (int64_t j = 0; sum != nullptr && j < columns; ++j) {
            dh[j] -= smoothing * sum[first + j];
          }
          convert(dh, gradients + row * d + first, columns);
        });
      }
    });
  });
  return made;
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(linear_cross_entropy_begin);
  PETL_KERNEL(linear_cross_entropy_words);
  PETL_KERNEL(linear_cross_entropy_end);
}
