// Elementwise kernels over contiguous memory: chunks that stay in the first-level cache, in the compute dtype.
#pragma once

#include "philox.h"

namespace petl {

constexpr int64_t kChunk = 1024;

// f(first, count) for chunks of the elements [0, total), in parallel. f calls no ATen op.
template <typename F>
void parallel_chunks(int64_t total, const F& f) {
  at::parallel_for(0, at::divup(total, kChunk), at::internal::GRAIN_SIZE / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(total, end * kChunk); first += kChunk) {
      f(first, std::min(kChunk, total - first));
    }
  });
}

// The dropout of count <= kChunk values, the first of which is element first. What is dropped is 0, even NaN.
template <typename T>
void drop(const Dropout& dropout, T* values, int64_t count, int64_t first) {
  if (!dropout) {
    return;
  }
  T factors[kChunk];
  dropout.factors(factors, count, first);
  using Vec = at::vec::Vectorized<T>;
  at::vec::map2<T>(
      [zero = Vec(0)](Vec value, Vec factor) { return Vec::blendv(zero, value * factor, factor > zero); },
      values,
      values,
      factors,
      count);
}

} // namespace petl
