// Where an operand of wgmma lies in shared memory: the 64-bit matrix descriptor.
//
// Facts: PTX ISA, section 9.7.15.5.1 (asynchronous warpgroup-level matrix shared memory layout, its strides, its
// canonical layouts and the matrix descriptor); they agree with what CUTLASS' make_gmma_desc says of its layouts.
// Every operand here has the 128-byte swizzle that TMA wrote it with: in a row of 128 bytes, 16-byte piece c of row r
// stands at place c ^ (r % 8). The pattern repeats every 1024 bytes, and tiles begin at multiples of that.
#pragma once

#include <cstdint>

constexpr int kSwizzleBytes = 128;
constexpr int kAtomBytes = 8 * kSwizzleBytes; // eight rows: the swizzle's period

// Addresses and distances are written in units of 16 bytes, 14 bits wide.
__device__ inline uint64_t in_units(uint32_t bytes) { return (bytes & 0x3ffff) >> 4; }

__device__ inline uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1; // bits 62 and 63; the base offset, bits 49 to 51, is 0 for tiles at 1024 bytes
  return in_units(address) | in_units(leading_bytes) << 16 | in_units(stride_bytes) << 32 | kSwizzle128 << 62;
}

// Rows of the operand (of M or N) are rows of 128 bytes of 64 neighbours along the contraction ("K-major").
// The stride leads to the next eight rows; the leading distance is not used.
struct ContractionInRows {
  static constexpr int kStep = 32; // bytes to the next 16 of the contraction
  __device__ static uint64_t at(uint32_t address) { return descriptor(address, 16, kAtomBytes); }
};

// Rows of 128 bytes hold 64 neighbouring columns (of N) for one index of the contraction ("MN-major", transposed).
// The stride leads to the next eight of the contraction, the leading distance to the next 64 columns.
template <int kDepth>
struct ColumnsInRows {
  static constexpr int kStep = 2 * kAtomBytes;
  static constexpr int kChunkBytes = kDepth * kSwizzleBytes;
  __device__ static uint64_t at(uint32_t address) { return descriptor(address, kChunkBytes, kAtomBytes); }
};
