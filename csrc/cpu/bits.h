// One bit an element, packed as petl_kernels/ops/bits.py says.
#pragma once

#include <array>

#include "common.h"

namespace petl {

inline int64_t packed_width(int64_t features) {
  return at::divup(features, 8);
}

// bits = which of the values are not zero; the last byte is padded with zeros.
template <typename T>
void pack_nonzero(const T* values, int64_t count, uint8_t* bits) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int kLanes = Vec::size();
  static_assert(8 % kLanes == 0);
  const int64_t whole = count / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    int zeros = 0;
    for (int lane = 0; lane < 8; lane += kLanes) {
      zeros |= Vec::loadu(values + 8 * byte + lane).zero_mask() << lane;
    }
    bits[byte] = static_cast<uint8_t>(~zeros);
  }
  if (count % 8 != 0) {
    bits[whole] = 0;
    for (int64_t j = 8 * whole; j < count; ++j) {
      bits[whole] |= static_cast<uint8_t>(values[j] != 0) << (j % 8);
    }
  }
}

// The mask of eight elements for each byte: all ones where the bit is set.
template <typename U>
const std::array<std::array<U, 8>, 256>& byte_masks() {
  static const auto masks = [] {
    std::array<std::array<U, 8>, 256> table;
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) {
        table[byte][k] = (byte >> k) & 1 ? ~U(0) : U(0);
      }
    }
    return table;
  }();
  return masks;
}

// values = values where their bit is set, else 0
template <typename T>
void keep_where(const uint8_t* bits, T* values, int64_t count) {
  using Plain = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  using Word [[gnu::may_alias]] = Plain;
  const auto& masks = byte_masks<Plain>();
  auto* words = reinterpret_cast<Word*>(values);
  const int64_t whole = count / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    const Plain* mask = masks[bits[byte]].data();
    for (int k = 0; k < 8; ++k) {
      words[8 * byte + k] &= mask[k];
    }
  }
  for (int64_t j = 8 * whole; j < count; ++j) {
    words[j] &= masks[bits[whole]][j % 8];
  }
}

} // namespace petl
