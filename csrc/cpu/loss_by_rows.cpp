// What linear_cross_entropy by rows does between its products, over one chunk of logits, a row at a time: a row stays in
// cache from its maximum to its gradient. The formulas are in petl_kernels/ops/linear_cross_entropy.py.
#include "exponential.h"
#include "kernel.h"
#include "rows.h"

namespace petl {
namespace {

template <typename scalar_t>
struct RowPass {
  using acc_t = compute_t<scalar_t>;

  // Columns at a time: few enough to stay in the first cache as acc_t, and for sums in acc_t to stay exact.
  static constexpr int64_t kBlock = 1024;

  int64_t words;
  const acc_t* bias;  // or null
  acc_t label_weight, word_weight, scale;

  // f(first column, count, z of these columns), for the whole row.
  template <typename F>
  void for_each_block(const scalar_t* logits, const F& f) const {
    alignas(64) acc_t z[kBlock];
    for (int64_t first = 0; first < words; first += kBlock) {
      const int64_t count = std::min(kBlock, words - first);
      convert(logits + first, z, count);
      if (bias == nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          z[j] *= scale;
        }
      } else {
        for (int64_t j = 0; j < count; ++j) {
          z[j] = z[j] * scale + bias[first + j];
        }
      }
      f(first, count, z);
    }
  }

  acc_t logit(const scalar_t* logits, int64_t word) const {
    return static_cast<acc_t>(logits[word]) * scale + (bias == nullptr ? acc_t(0) : bias[word]);
  }

  acc_t maximum(const scalar_t* logits) const {
    acc_t top = -std::numeric_limits<acc_t>::infinity();
    for_each_block(logits, [&](int64_t, int64_t count, const acc_t* z) {
      const auto larger = [](Vec<acc_t> a, Vec<acc_t> b) { return at::vec::maximum(a, b); };
      const acc_t block_top = at::vec::reduce_all<acc_t>(larger, z, count);
      top = block_top > top || std::isnan(block_top) ? block_top : top;
    });
    return top;
  }

  // Σ exp(z - top), Σ (z - top)
  std::pair<double, double> sums(const scalar_t* logits, acc_t top) const {
    double sum_exp = 0, sum = 0;
    for_each_block(logits, [&](int64_t, int64_t count, const acc_t* z) {
      const Vec<acc_t> tops(top);
      const auto add = [](Vec<acc_t> a, Vec<acc_t> b) { return a + b; };
      sum_exp += at::vec::map_reduce_all<acc_t>([&](Vec<acc_t> v) { return exponential<scalar_t>(v - tops); }, add, z, count);
      if (word_weight != 0) {
        sum += at::vec::map_reduce_all<acc_t>([&](Vec<acc_t> v) { return v - tops; }, add, z, count);
      }
    });
    return {sum_exp, sum};
  }

  // The loss of one row, and dz for dloss in place of its logits where there is one to compute.
  acc_t operator()(scalar_t* logits, int64_t label, bool gradient, acc_t dloss) const {
    const acc_t top = maximum(logits);
    const auto [sum_exp, sum] = sums(logits, top);
    const double log_sum = std::log(sum_exp);
    const acc_t label_logit = logit(logits, label);
    double loss = log_sum - label_weight * static_cast<double>(label_logit - top);
    if (word_weight != 0) {  // without it, 0 · inf for words whose logit is -inf
      loss -= word_weight * sum;
    }
    if (gradient) {
      write_gradient(logits, top, static_cast<acc_t>(log_sum), dloss);
      const acc_t p = std::exp(label_logit - top - static_cast<acc_t>(log_sum));
      logits[label] = static_cast<scalar_t>((p - word_weight - label_weight) * dloss);
    }
    return static_cast<acc_t>(loss);
  }

  void write_gradient(scalar_t* logits, acc_t top, acc_t log_sum, acc_t dloss) const {
    const Vec<acc_t> tops(top), log_sums(log_sum), word_weights(word_weight), dlosses(dloss);
    for_each_block(logits, [&](int64_t first, int64_t count, acc_t* z) {
      at::vec::map<acc_t>(
          [&](Vec<acc_t> v) { return (exponential<scalar_t>(v - tops - log_sums) - word_weights) * dlosses; }, z, z, count);
      convert(z, logits + first, count);
    });
  }
};

} // namespace

Tensor linear_cross_entropy(
    const Tensor& logits,
    const Tensor& labels,
    const OptionalTensor& bias,
    double label_weight,
    double word_weight,
    double scale,
    const OptionalTensor& dlosses,
    bool gradient) {
  const int64_t rows = logits.size(0), words = logits.size(1);
  TORCH_CHECK(words == 1 || logits.stride(1) == 1, "the words of a row of logits must lie side by side");
  Tensor losses = at::empty({rows}, logits.options().dtype(compute_type(logits)));
  const Tensor label_rows = labels.contiguous();
  PETL_DISPATCH_FLOATING(logits.scalar_type(), "linear_cross_entropy", [&] {
    using acc_t = compute_t<scalar_t>;
    const RowPass<scalar_t> pass{
        words,
        bias ? bias->const_data_ptr<acc_t>() : nullptr,
        static_cast<acc_t>(label_weight),
        static_cast<acc_t>(word_weight),
        static_cast<acc_t>(scale)};
    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
    const int64_t* label = label_rows.const_data_ptr<int64_t>();
    const acc_t* dloss = dlosses ? dlosses->const_data_ptr<acc_t>() : nullptr;
    acc_t* loss = losses.mutable_data_ptr<acc_t>();
    const int64_t stride = logits.stride(0);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        loss[row] = pass(data + row * stride, label[row], gradient, dloss == nullptr ? acc_t(1) : dloss[row]);
      }
    });
  });
  return losses;
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(linear_cross_entropy);
}
