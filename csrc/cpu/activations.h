// Activations and their derivatives over values in the compute dtype.
#pragma once

#include <string_view>

#include "common.h"

namespace petl {

enum class Activation { relu, gelu, silu, gelu_tanh };

inline Activation parse_activation(std::string_view name) {
  if (name == "relu") {
    return Activation::relu;
  }
  if (name == "gelu") {
    return Activation::gelu;
  }
  if (name == "gelu_tanh") {
    return Activation::gelu_tanh;
  }
  TORCH_CHECK(name == "silu", "unknown activation ", name);
  return Activation::silu;
}

// gelu_tanh(z) = z σ(2u(z)) with 2u(z) = 2 √(2/π) (z + 0.044715 z³), since (1 + tanh(u)) / 2 = σ(2u).
template <typename T>
struct GeluTanh {
  using Vec = at::vec::Vectorized<T>;
  Vec linear{T(1.59576912160573071176)}, cubic{T(0.044715 * 1.59576912160573071176)}, three{T(3)}, one{T(1)}, large{T(1e30)};

  // e = exp(-2u): σ(2u) = 1 / (1 + e)
  Vec exponential(Vec z) const { return (z * (linear + cubic * z * z)).neg().exp(); }
  Vec slope(Vec z) const { return linear + three * cubic * z * z; }
};

// The normal distribution at z from exp(-z² / 2), which its density needs too. fp32: Abramowitz and Stegun 7.1.26, as
// at::vec's erf has it, without a second exponential.
template <typename V>
V normal_distribution(V z, V exponential) {
  using T = typename V::value_type;
  if constexpr (std::is_same_v<T, double>) {
    return V(0.5) * (V(1) + (z * V(0.70710678118654752440)).erf());
  } else {
    const V t = V(1) / (V(1) + V(T(0.3275911 * 0.70710678118654752440)) * z.abs());
    V r = at::vec::fmadd(V(T(1.061405429)), t, V(T(-1.453152027)));
    r = at::vec::fmadd(r, t, V(T(1.421413741)));
    r = at::vec::fmadd(r, t, V(T(-0.284496736)));
    r = at::vec::fmadd(r, t, V(T(0.254829592)));
    const V tail = V(T(0.5)) * r * t * exponential;
    return V::blendv(tail, V(1) - tail, z > V(0));
  }
}

// values = act(values)
template <typename T>
void activate(Activation activation, T* values, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(0), half(T(0.5)), one(1), sqrt_half(T(0.70710678118654752440));
  switch (activation) {
    case Activation::relu:
      return at::vec::map<T>([=](Vec z) { return at::vec::maximum(z, zero); }, values, values, count);
    case Activation::gelu:
      return at::vec::map<T>([=](Vec z) { return half * z * (one + (z * sqrt_half).erf()); }, values, values, count);
    case Activation::silu:
      return at::vec::map<T>([=](Vec z) { return z / (one + z.neg().exp()); }, values, values, count);
    case Activation::gelu_tanh:
      return at::vec::map<T>([f = GeluTanh<T>()](Vec z) { return z / (f.one + f.exponential(z)); }, values, values, count);
  }
}

// grads = grads ⊙ act'(z)
template <typename T>
void activate_backward(Activation activation, const T* z, T* grads, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(0), half(T(0.5)), one(1);
  const Vec density_at_zero(T(0.39894228040143267794));
  switch (activation) {
    case Activation::relu:
      return at::vec::map2<T>(
          [=](Vec z, Vec grad) { return Vec::blendv(grad, zero, z <= zero); }, grads, z, grads, count);
    case Activation::gelu:
      return at::vec::map2<T>(
          [=](Vec z, Vec grad) {
            const Vec exponential = (z * z * half).neg().exp();
            return grad * (normal_distribution(z, exponential) + z * density_at_zero * exponential);
          },
          grads,
          z,
          grads,
          count);
    case Activation::silu:
      return at::vec::map2<T>(
          [=](Vec z, Vec grad) {
            const Vec gate = one / (one + z.neg().exp());
            return grad * gate * (one + z * (one - gate));
          },
          grads,
          z,
          grads,
          count);
    case Activation::gelu_tanh:
      return at::vec::map2<T>(
          [f = GeluTanh<T>()](Vec z, Vec grad) {
            // 1 - σ as e σ: the difference would lose what the slope, up to z², brings out again.
            const Vec e = at::vec::minimum(f.exponential(z), f.large), gate = f.one / (f.one + e);
            return grad * gate * (f.one + z * (e * gate) * f.slope(z));
          },
          grads,
          z,
          grads,
          count);
  }
}

} // namespace petl
