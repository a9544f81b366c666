// exp for the vocabulary loss.
#pragma once

#include "common.h"

namespace petl {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// To the precision that the logits' dtype deserves: 16-bit logits are 2⁻⁹ off, the fast exp is 10⁻⁶ off.
template <typename scalar_t, typename acc_t>
Vec<acc_t> exponential(Vec<acc_t> x) {
  if constexpr (sizeof(scalar_t) == 2) {
    return x.exp_u20();
  } else {
    return x.exp();
  }
}

} // namespace petl
