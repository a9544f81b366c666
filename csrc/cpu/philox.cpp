#include "philox.h"

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace petl {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;
constexpr int kRounds = 7;
constexpr double kLevels = 65536;
// A counter gives kOutputs words, the low and high halves of which are the numbers of kShared neighbouring elements;
// kLanes counters are computed at a time.
constexpr int64_t kOutputs = 4, kShared = 8, kLanes = 4, kGroup = kShared * kLanes;

inline uint32_t high(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}

// out[0 .. 32) = the numbers of the counters (counter, 0, 0, 0) to (counter + 3, 0, 0, 0): word by word of one counter
// after the other or, kSwapped, counter by counter of one word after the other.
#if defined(__AVX2__)
// Outputs are computed in the low halves of 64-bit lanes: that is where the widening product reads its operands, so the
// high halves may hold anything and no lane moves before the end. The compiler, left to itself, keeps 32-bit lanes and
// spends half its time moving them.
template <bool kSwapped>
inline void random_group(uint16_t* out, uint32_t counter, uint32_t k0, uint32_t k1) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  // The unpacking below puts counters in this order into ascending order.
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_setr_epi64x(0, 2, 1, 3));
  __m256i c1 = _mm256_setzero_si256(), c2 = c1, c3 = c1;
#pragma GCC unroll 7
  for (int round = 0; round < kRounds; ++round) {
    const __m256i left = _mm256_mul_epu32(c0, multiplier0), right = _mm256_mul_epu32(c2, multiplier1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(right, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(left, 32), c3), _mm256_set1_epi64x(k1));
    c1 = right;
    c3 = left;
    k0 += kStep0;
    k1 += kStep1;
  }
  const __m256i first_half = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second_half = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  // Counters 0 and 1, then 2 and 3, with their words in order.
  __m256i groups[2] = {
      _mm256_unpacklo_epi64(first_half, second_half), _mm256_unpackhi_epi64(first_half, second_half)};
  if constexpr (kSwapped) {
    // A matrix of 4 counters and 4 words is turned round.
    const __m256i low = _mm256_permute2x128_si256(groups[0], groups[1], 0x20);  // counters 0 and 2
    const __m256i next = _mm256_permute2x128_si256(groups[0], groups[1], 0x31);  // counters 1 and 3
    const __m256i words01 = _mm256_unpacklo_epi32(low, next), words23 = _mm256_unpackhi_epi32(low, next);
    groups[0] = _mm256_permute4x64_epi64(words01, 0b11011000);
    groups[1] = _mm256_permute4x64_epi64(words23, 0b11011000);
  }
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, groups[0]);
  _mm256_storeu_si256(to + 1, groups[1]);
}
#else
template <bool kSwapped>
inline void random_group(uint16_t* out, uint32_t counter, uint32_t key0, uint32_t key1) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    uint32_t c0 = counter + lane, c1 = 0, c2 = 0, c3 = 0, k0 = key0, k1 = key1;
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
    const uint32_t outputs[kOutputs] = {c0, c1, c2, c3};
    for (int64_t word = 0; word < kOutputs; ++word) {
      uint16_t* to = out + 2 * (kSwapped ? word * kLanes + lane : lane * kOutputs + word);
      to[0] = static_cast<uint16_t>(outputs[word]);
      to[1] = static_cast<uint16_t>(outputs[word] >> 16);
    }
  }
}
#endif

} // namespace

Dropout::Dropout(double p, const OptionalTensor& seed, int64_t features)
    : p_(p),
      seed_(p > 0 ? static_cast<uint64_t>(*seed.value().const_data_ptr<int64_t>()) : 0),
      threshold_(static_cast<uint32_t>(std::nearbyint(p * kLevels))),
      features_(std::max<int64_t>(1, features)),
      row_counters_(at::divup(features_, kShared)) {}

template <typename T>
void Dropout::factors(T* factors, int64_t count, int64_t first) const {
  int64_t row = first / features_, column = first % features_;
  while (count > 0) {
    const int64_t n = std::min(count, features_ - column);
    row_factors<false>(factors, n, row, column);
    factors += n, count -= n;
    ++row, column = 0;
  }
}

template <typename T>
void Dropout::probability_factors(T* factors, int64_t count, int64_t row, int64_t column) const {
  row_factors<true>(factors, count, row, column);
}

template <bool kSwapped, typename T>
void Dropout::row_factors(T* factors, int64_t count, int64_t row, int64_t column) const {
  constexpr int64_t kRun = 1024, kUnit = kSwapped ? kGroup : kShared;
  // Room for the elements before the first of its unit, and after the last of its group.
  uint16_t random[kRun + kGroup + kUnit];
  const T kept = static_cast<T>(kLevels / (kLevels - threshold_));
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t n = std::min(kRun, count - start);
    const int64_t before = (column + start) % kUnit;
    const int64_t counter = row * row_counters_ + (column + start - before) / kShared;
    for (int64_t j = 0; j < before + n; j += kGroup) {
      random_group<kSwapped>(
          random + j, static_cast<uint32_t>(counter + j / kShared), static_cast<uint32_t>(seed_), high(seed_));
    }
    for (int64_t j = 0; j < n; ++j) {
      factors[start + j] = random[before + j] >= threshold_ ? kept : T(0);
    }
  }
}

template void Dropout::factors(float*, int64_t, int64_t) const;
template void Dropout::factors(double*, int64_t, int64_t) const;
template void Dropout::probability_factors(float*, int64_t, int64_t, int64_t) const;
template void Dropout::probability_factors(double*, int64_t, int64_t, int64_t) const;

} // namespace petl
