// Dropout from a seed; the definition is in petl_kernels/ops/philox.py.
#pragma once

#include "common.h"

namespace petl {

class Dropout {
 public:
  // p in [0, 1); seed: int64 tensor of shape (1,), read when p > 0.
  Dropout(double p, const OptionalTensor& seed);

  explicit operator bool() const { return p_ > 0; }

  // factors[j] = 0 where element first + j is dropped, 1 / (1 - p) where it is kept. T: float or double.
  template <typename T>
  void factors(T* factors, int64_t count, int64_t first) const;

 private:
  double p_;
  uint64_t seed_;
  uint32_t threshold_;
};

} // namespace petl
