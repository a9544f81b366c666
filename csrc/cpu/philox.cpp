#include "philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace petl {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;
constexpr int kRounds = 10;
// A counter gives the numbers of kOutputs neighbouring elements; kLanes counters are computed at a time.
constexpr int64_t kOutputs = 4, kLanes = 4, kGroup = kOutputs * kLanes;

inline uint32_t high(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}

#if defined(__AVX2__)
// out[0 .. 16) = the outputs of the counters (counter, 0, 0, 0) to (counter + 3, 0, 0, 0), in the low halves of 64-bit
// lanes: that is where the widening product reads its operands, so the high halves may hold anything and no lane moves
// before the end. The compiler, left to itself, keeps 32-bit lanes and spends half its time moving them.
inline void random_group(uint32_t* out, uint32_t counter, uint32_t k0, uint32_t k1) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  // In this order the unpacking below leaves the counters in theirs.
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_setr_epi64x(0, 2, 1, 3));
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
  const __m256i first_half = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second_half = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  auto* groups = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(groups, _mm256_unpacklo_epi64(first_half, second_half));
  _mm256_storeu_si256(groups + 1, _mm256_unpackhi_epi64(first_half, second_half));
}
#else
inline void random_group(uint32_t* out, uint32_t counter, uint32_t key0, uint32_t key1) {
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
    std::copy(outputs, outputs + kOutputs, out + lane * kOutputs);
  }
}
#endif

} // namespace

Dropout::Dropout(double p, const OptionalTensor& seed)
    : p_(p),
      seed_(p > 0 ? static_cast<uint64_t>(*seed.value().const_data_ptr<int64_t>()) : 0),
      threshold_(static_cast<uint32_t>(p * 4294967296.0)) {}

template <typename T>
void Dropout::factors(T* factors, int64_t count, int64_t first) const {
  constexpr int64_t kRun = 1024;
  // Room for the elements before the first of its counter, and after the last of its group.
  uint32_t random[kRun + kGroup + kOutputs];
  const T kept = static_cast<T>(1 / (1 - p_));
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t n = std::min(kRun, count - start);
    const int64_t before = (first + start) % kOutputs, counter = (first + start) / kOutputs;
    for (int64_t j = 0; j < before + n; j += kGroup) {
      random_group(
          random + j, static_cast<uint32_t>(counter + j / kOutputs), static_cast<uint32_t>(seed_), high(seed_));
    }
    for (int64_t j = 0; j < n; ++j) {
      factors[start + j] = random[before + j] >= threshold_ ? kept : T(0);
    }
  }
}

template void Dropout::factors(float*, int64_t, int64_t) const;
template void Dropout::factors(double*, int64_t, int64_t) const;

} // namespace petl
