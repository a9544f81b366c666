#include "philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace petl {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;
constexpr int kRounds = 10;

inline uint32_t high(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}

// The first output for the counter (index, 0, 0, 0).
inline uint32_t random_value(uint32_t index, uint32_t k0, uint32_t k1) {
  uint32_t c0 = index, c1 = 0, c2 = 0, c3 = 0;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t left = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t right = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = high(right) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = high(left) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += kStep0;
    k1 += kStep1;
  }
  return c0;
}

#if defined(__AVX2__)
// The same for the counters index, index + 2, index + 4, index + 6, in the low halves of the 64-bit lanes: that is
// where the widening product reads its operands, so the high halves may hold anything and no lane ever moves. The
// compiler, left to itself, keeps 32-bit lanes and spends half its time moving them.
inline __m256i random_lanes(uint32_t index, uint32_t k0, uint32_t k1) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(index), _mm256_set_epi64x(6, 4, 2, 0));
  __m256i c1 = _mm256_setzero_si256(), c2 = c1, c3 = c1;
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    const __m256i left = _mm256_mul_epu32(c0, multiplier0), right = _mm256_mul_epu32(c2, multiplier1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(right, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(left, 32), c3), _mm256_set1_epi64x(k1));
    c1 = right;
    c3 = left;
    k0 += kStep0;
    k1 += kStep1;
  }
  return c0;
}
#endif

// out[j] = the first output for the counter (first + j, 0, 0, 0)
void random_values(uint32_t* out, int64_t count, uint32_t first, uint64_t seed) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = high(seed);
  int64_t j = 0;
#if defined(__AVX2__)
  for (; j + 8 <= count; j += 8) {
    const __m256i even = random_lanes(first + static_cast<uint32_t>(j), k0, k1);
    const __m256i odd = random_lanes(first + static_cast<uint32_t>(j) + 1, k0, k1);
    const __m256i both = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), both);
  }
#endif
  for (; j < count; ++j) {
    out[j] = random_value(first + static_cast<uint32_t>(j), k0, k1);
  }
}

} // namespace

Dropout::Dropout(double p, const OptionalTensor& seed)
    : p_(p),
      seed_(p > 0 ? static_cast<uint64_t>(seed.value().item<int64_t>()) : 0),
      threshold_(static_cast<uint32_t>(p * 4294967296.0)) {}

template <typename T>
void Dropout::factors(T* factors, int64_t count, int64_t first) const {
  constexpr int64_t kRun = 1024;
  uint32_t random[kRun];
  const T kept = static_cast<T>(1 / (1 - p_));
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t n = std::min(kRun, count - start);
    random_values(random, n, static_cast<uint32_t>(first + start), seed_);
    for (int64_t j = 0; j < n; ++j) {
      factors[start + j] = random[j] >= threshold_ ? kept : T(0);
    }
  }
}

template void Dropout::factors(float*, int64_t, int64_t) const;
template void Dropout::factors(double*, int64_t, int64_t) const;

} // namespace petl
