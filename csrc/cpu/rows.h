// Loops over one row of features, in the dtype of sums.
#pragma once

#include <utility>

#include "common.h"

namespace petl {

// The sums of a pair of terms over a row, or over several of one length: term takes a vector of each row's numbers and
// returns a vector of each sum's terms. Four vectors of each sum are under way, which hides the latency of an addition.
template <typename T, typename F, typename... Rows>
std::pair<T, T> sum_pairs(int64_t count, const F& term, const Rows*... rows) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kLanes = Vec::size(), kChains = 4;
  const Vec zero(T(0));
  Vec p[kChains] = {zero, zero, zero, zero}, q[kChains] = {zero, zero, zero, zero};
  int64_t j = 0;
  for (; j + kChains * kLanes <= count; j += kChains * kLanes) {
#pragma GCC unroll 4
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const auto [to_p, to_q] = term(Vec::loadu(rows + j + chain * kLanes)...);
      p[chain] = p[chain] + to_p;
      q[chain] = q[chain] + to_q;
    }
  }
  for (; j < count; j += kLanes) {
    const int64_t rest = std::min(kLanes, count - j);
    const auto [to_p, to_q] = term(Vec::loadu(rows + j, rest)...);
    p[0] = p[0] + Vec::set(zero, to_p, rest);
    q[0] = q[0] + Vec::set(zero, to_q, rest);
  }
  const auto total = [](const Vec* sums) {
    const auto add = [](Vec one, Vec other) { return one + other; };
    return at::vec::vec_reduce_all<T>(add, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  };
  return {total(p), total(q)};
}

// to += from
template <typename T>
void accumulate(const T* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] += from[j];
  }
}

// The mean, as offset + rest, and the variance of a row. The mean is found in two steps: the rounding of the first is as
// large as the row's offset, and what it leaves is a small number that the second finds exactly enough.
template <typename T>
struct Moments {
  T offset, rest, variance;
};

template <typename T>
Moments<T> row_moments(const T* __restrict x, int64_t features) {
  using Vec = at::vec::Vectorized<T>;
  const T offset = sum_pairs<T>(features, [](Vec v) { return std::pair(v, Vec(T(0))); }, x).first / features;
  const auto centred_terms = [offsets = Vec(offset)](Vec v) {
    const Vec centred = v - offsets;
    return std::pair(centred, centred * centred);
  };
  const auto [rests, squares] = sum_pairs<T>(features, centred_terms, x);
  const T rest = rests / features;
  return {offset, rest, std::max(T(0), squares / features - rest * rest)};
}

// n = (x - mean) · rstd; returns rstd. n may not be x.
template <typename T>
T normalise_row(const T* __restrict x, T* __restrict n, int64_t features, T eps) {
  const auto [offset, rest, variance] = row_moments(x, features);
  const T rstd = 1 / std::sqrt(variance + eps);
  for (int64_t j = 0; j < features; ++j) {
    n[j] = ((x[j] - offset) - rest) * rstd;
  }
  return rstd;
}

// The gradient of a row through normalise_row, from g = dn, in place of g.
template <typename T>
void normalise_row_backward(T* __restrict g, const T* __restrict n, T rstd, int64_t features) {
  using Vec = at::vec::Vectorized<T>;
  const auto [sum_g, sum_gn] = sum_pairs<T>(features, [](Vec g, Vec n) { return std::pair(g, g * n); }, g, n);
  const T mean_g = sum_g / features, mean_gn = sum_gn / features;
  for (int64_t j = 0; j < features; ++j) {
    g[j] = (g[j] - mean_g - n[j] * mean_gn) * rstd;
  }
}

} // namespace petl
