// Dropout from a seed; the definition is in petl_kernels/ops/philox.py.
#pragma once

#include "common.h"

namespace petl {

class Dropout {
 public:
  // p as ops/philox.py checks it; seed: int64 tensor of shape (1,), read when p > 0; rows of so many elements.
  Dropout(double p, const OptionalTensor& seed, int64_t features);

  explicit operator bool() const { return p_ > 0; }

  // factors[j] = 0 where element first + j of the contiguous rows is dropped, the keep scale where it is kept.
  // T: float or double.
  template <typename T>
  void factors(T* factors, int64_t count, int64_t first) const;

  // Does the same for elements of one row of attention's probabilities, whose places are swapped (philox.place).
  template <typename T>
  void probability_factors(T* factors, int64_t count, int64_t row, int64_t column) const;

 private:
  template <bool kSwapped, typename T>
  void row_factors(T* factors, int64_t count, int64_t row, int64_t column) const;

  double p_;
  uint64_t seed_;
  uint32_t threshold_;
  int64_t features_, row_counters_;
};

} // namespace petl
