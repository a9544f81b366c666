// The formulas are in petl_kernels/ops/activation.py.
//
// relu works on its own dtype, eight elements and one byte of bits at a time. gelu and silu without dropout are the
// library's, which uses wider vectors where the processor has them; the rest goes through the compute dtype.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "activations.h"
#include "elementwise.h"
#include "kernel.h"

namespace petl {
namespace {

#if defined(__AVX2__)
// A 16-bit float is above 0 where its bits are as a signed integer; those of a negative NaN are not.
template <typename T>
__m128i positive_halves(__m128i z) {
  const __m128i infinity = _mm_set1_epi16(std::is_same_v<T, at::Half> ? 0x7C00 : 0x7F80);
  const __m128i nan = _mm_cmpgt_epi16(_mm_and_si128(z, _mm_set1_epi16(0x7FFF)), infinity);
  return _mm_or_si128(_mm_cmpgt_epi16(z, _mm_setzero_si128()), nan);
}

// y = relu(z) for eight elements; returns their bits.
template <typename T>
uint8_t relu_eight(const T* z, T* y) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(z));
  const __m128i positive = positive_halves<T>(values);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_and_si128(values, positive));
  return static_cast<uint8_t>(_mm_movemask_epi8(_mm_packs_epi16(positive, _mm_setzero_si128())));
}

uint8_t relu_eight(const float* z, float* y) {
  const __m256 values = _mm256_loadu_ps(z);
  const __m256 positive = _mm256_cmp_ps(values, _mm256_setzero_ps(), _CMP_NLE_UQ);
  _mm256_storeu_ps(y, _mm256_and_ps(values, positive));
  return static_cast<uint8_t>(_mm256_movemask_ps(positive));
}

uint8_t relu_eight(const double* z, double* y) {
  int bits = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256d values = _mm256_loadu_pd(z + 4 * half);
    const __m256d positive = _mm256_cmp_pd(values, _mm256_setzero_pd(), _CMP_NLE_UQ);
    _mm256_storeu_pd(y + 4 * half, _mm256_and_pd(values, positive));
    bits |= _mm256_movemask_pd(positive) << (4 * half);
  }
  return static_cast<uint8_t>(bits);
}

// dz = dy where its bit is set, else 0, for eight elements.
template <typename T>
void select_eight(const T* dy, uint8_t bits, T* dz) {
  const __m128i places = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
  const __m128i set = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(bits), places), places);
  const __m128i grads = _mm_loadu_si128(reinterpret_cast<const __m128i*>(dy));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dz), _mm_and_si128(grads, set));
}

void select_eight(const float* dy, uint8_t bits, float* dz) {
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), places), places);
  _mm256_storeu_ps(dz, _mm256_and_ps(_mm256_loadu_ps(dy), _mm256_castsi256_ps(set)));
}

void select_eight(const double* dy, uint8_t bits, double* dz) {
  for (int half = 0; half < 2; ++half) {
    const __m256i places = _mm256_setr_epi64x(1 << 4 * half, 2 << 4 * half, 4 << 4 * half, 8 << 4 * half);
    const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), places), places);
    _mm256_storeu_pd(dz + 4 * half, _mm256_and_pd(_mm256_loadu_pd(dy + 4 * half), _mm256_castsi256_pd(set)));
  }
}
#else
template <typename T>
uint8_t relu_eight(const T* z, T* y) {
  int bits = 0;
  for (int j = 0; j < 8; ++j) {
    const bool positive = !(static_cast<compute_t<T>>(z[j]) <= 0);
    y[j] = positive ? z[j] : T(0);
    bits |= positive << j;
  }
  return static_cast<uint8_t>(bits);
}

template <typename T>
void select_eight(const T* dy, uint8_t bits, T* dz) {
  for (int j = 0; j < 8; ++j) {
    dz[j] = bits >> j & 1 ? dy[j] : T(0);
  }
}
#endif

// f(in, bits, out) for every eight elements and their byte; what is left over passes through eight of its own.
template <typename T, typename Bits, typename F>
void for_each_eight(const T* in, Bits* bits, T* out, int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    f(in + j, bits[j / 8], out + j);
  }
  if (j < count) {
    T rest[8] = {};
    std::copy(in + j, in + count, rest);
    f(rest, bits[j / 8], rest);
    std::copy(rest, rest + (count - j), out + j);
  }
}

int64_t bytes_of(int64_t features) {
  return at::divup(features, 8);
}

// f(first, count, first_byte) for runs of at most kChunk elements that begin with a byte of their row, in parallel.
template <typename F>
void parallel_bytes(const Tensor& matrix, const F& f) {
  // Rows that end with a byte follow each other without a gap.
  const bool whole = matrix.size(1) % 8 == 0;
  const int64_t rows = whole ? 1 : matrix.size(0), features = whole ? matrix.numel() : matrix.size(1);
  const int64_t runs = at::divup(features, kChunk), row_bytes = bytes_of(features);
  at::parallel_for(0, rows * runs, at::internal::GRAIN_SIZE / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t row = run / runs, column = run % runs * kChunk;
      f(row * features + column, std::min(kChunk, features - column), row * row_bytes + column / 8);
    }
  });
}

// drop() of values that are not in the compute dtype.
template <typename T>
void drop_narrow(const Dropout& dropout, T* values, int64_t count, int64_t first) {
  if (!dropout) {
    return;
  }
  compute_t<T> buffer[kChunk];
  compute_t<T>* wide = in_place_or(values, buffer);
  if (wide == buffer) {
    convert(values, wide, count);
  }
  drop(dropout, wide, count, first);
  settle(wide, values, count);
}

Tensor packed_relu(const Tensor& rows, const Dropout& dropout, Tensor& y) {
  Tensor bits = empty({rows.size(0), bytes_of(rows.size(1))}, at::kByte);
  PETL_DISPATCH_FLOATING(rows.scalar_type(), "activation", [&] {
    const auto* z_data = rows.const_data_ptr<scalar_t>();
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    auto* bits_data = bits.mutable_data_ptr<uint8_t>();
    parallel_bytes(rows, [&](int64_t first, int64_t count, int64_t byte) {
      for_each_eight(
          z_data + first, bits_data + byte, y_data + first, count, [](const scalar_t* z, uint8_t& bits, scalar_t* y) {
            bits = relu_eight(z, y);
          });
      drop_narrow(dropout, y_data + first, count, first);
    });
  });
  return bits;
}

void packed_relu_backward(const Tensor& dy, const Tensor& bits, const Dropout& dropout, Tensor& dz) {
  PETL_DISPATCH_FLOATING(dy.scalar_type(), "activation_backward", [&] {
    const auto* dy_data = dy.const_data_ptr<scalar_t>();
    const auto* bits_data = bits.const_data_ptr<uint8_t>();
    auto* dz_data = dz.mutable_data_ptr<scalar_t>();
    parallel_bytes(dy, [&](int64_t first, int64_t count, int64_t byte) {
      for_each_eight(
          dy_data + first,
          bits_data + byte,
          dz_data + first,
          count,
          [](const scalar_t* dy, uint8_t bits, scalar_t* dz) { select_eight(dy, bits, dz); });
      drop_narrow(dropout, dz_data + first, count, first);
    });
  });
}

} // namespace

std::tuple<Tensor, Tensor> activation(
    const Tensor& z, std::string_view kind, double dropout, const OptionalTensor& seed) {
  const Tensor rows = as_rows(z);
  const Dropout mask(dropout, seed, z.size(-1));
  const Activation act = parse_activation(kind);
  const Tensor no_bits = absent(at::kByte);
  if (!mask && (act == Activation::gelu || act == Activation::silu)) {
    return {(act == Activation::gelu ? at::gelu(rows) : at::silu(rows)).view(z.sizes()), no_bits};
  }
  Tensor y = empty(z.sizes(), z.scalar_type());
  if (act == Activation::relu) {
    Tensor bits = packed_relu(rows, mask, y);
    return {y, bits};
  }
  PETL_DISPATCH_FLOATING(z.scalar_type(), "activation", [&] {
    const auto* z_data = rows.const_data_ptr<scalar_t>();
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    parallel_chunks(rows.numel(), [&](int64_t first, int64_t count) {
      compute_t<scalar_t> values[kChunk];
      convert(z_data + first, values, count);
      activate(act, values, count);
      drop(mask, values, count, first);
      convert(values, y_data + first, count);
    });
  });
  return {y, no_bits};
}

Tensor activation_backward(
    const Tensor& dy, const Tensor& saved, std::string_view kind, double dropout, const OptionalTensor& seed) {
  const Tensor rows = as_rows(dy);
  const Dropout mask(dropout, seed, dy.size(-1));
  const Activation act = parse_activation(kind);
  if (act == Activation::relu) {
    Tensor dz = empty(dy.sizes(), dy.scalar_type());
    packed_relu_backward(rows, saved.contiguous(), mask, dz);
    return dz;
  }
  const Tensor z = as_rows(saved);
  if (!mask && (act == Activation::gelu || act == Activation::silu)) {
    return (act == Activation::gelu ? at::gelu_backward(rows, z) : at::silu_backward(rows, z)).view(dy.sizes());
  }
  Tensor dz = empty(dy.sizes(), dy.scalar_type());
  PETL_DISPATCH_FLOATING(dy.scalar_type(), "activation_backward", [&] {
    const auto* dy_data = rows.const_data_ptr<scalar_t>();
    const auto* z_data = z.const_data_ptr<scalar_t>();
    auto* dz_data = dz.mutable_data_ptr<scalar_t>();
    parallel_chunks(rows.numel(), [&](int64_t first, int64_t count) {
      compute_t<scalar_t> buffer[kChunk] = {}, grads[kChunk];
      convert(dy_data + first, grads, count);
      drop(mask, grads, count, first);
      activate_backward(act, converted(z_data + first, buffer, count), grads, count);
      convert(grads, dz_data + first, count);
    });
  });
  return dz;
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(activation);
  PETL_KERNEL(activation_backward);
}
