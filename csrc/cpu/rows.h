// Loops over one row of features, in the dtype of sums.
#pragma once

#include <utility>

#include "common.h"

namespace petl {

// The sums over j of a pair of terms, as many independent sums as fill the vector units and hide their latency.
template <typename T, typename F>
std::pair<T, T> sum_pairs(int64_t count, const F& term) {
  constexpr int64_t kLanes = 32;
  T p[kLanes] = {}, q[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto [to_p, to_q] = term(j + lane);
      p[lane] += to_p;
      q[lane] += to_q;
    }
  }
  for (int64_t j = whole; j < count; ++j) {
    const auto [to_p, to_q] = term(j);
    p[j - whole] += to_p;
    q[j - whole] += to_q;
  }
  T sum_p = 0, sum_q = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum_p += p[lane];
    sum_q += q[lane];
  }
  return {sum_p, sum_q};
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
  const T offset = sum_pairs<T>(features, [&](int64_t j) { return std::pair(x[j], T(0)); }).first / features;
  const auto [rests, squares] = sum_pairs<T>(features, [&](int64_t j) {
    const T centred = x[j] - offset;
    return std::pair(centred, centred * centred);
  });
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
  const auto [sum_g, sum_gn] = sum_pairs<T>(features, [&](int64_t j) { return std::pair(g[j], g[j] * n[j]); });
  const T mean_g = sum_g / features, mean_gn = sum_gn / features;
  for (int64_t j = 0; j < features; ++j) {
    g[j] = (g[j] - mean_g - n[j] * mean_gn) * rstd;
  }
}

} // namespace petl
