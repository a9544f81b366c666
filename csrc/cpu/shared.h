// Constants that petl_kernels/ops has as well, since a package without the extension needs them too.
// tests/ops/test_build.py compares the two, through constants().
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace petl {

// ops/frozen_ffn.py: the bytes of hidden values in a chunk, and its fewest rows.
constexpr int64_t kChunkBytes = 8 << 20, kChunkRows = 256;

// ops/loss_by_words.py: how far above m a logit may be before m rises.
constexpr double kRise = 8;

// ops/quantized: the bytes of a tile of dequantized values, values that share an absmax, absmaxes that share a scale.
constexpr int64_t kTileBytes = 1 << 20, kBlock = 64, kSuperblock = 256;

// Literals in fp64, which are rounded twice, as Python rounds them: one of the thresholds is halfway between two floats.
constexpr float kCode[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};

// A value above kThresholds[i] has a code above i.
constexpr float kThresholds[15] = {
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011};

inline std::map<std::string, std::vector<double>> constants() {
  const auto listed = [](const auto& values) { return std::vector<double>(std::begin(values), std::end(values)); };
  return {
      {"frozen_ffn.CHUNK_BYTES", {kChunkBytes}},
      {"frozen_ffn.CHUNK_ROWS", {kChunkRows}},
      {"loss_by_words.RISE", {kRise}},
      {"quantized.TILE_BYTES", {kTileBytes}},
      {"quantized.BLOCK", {kBlock}},
      {"quantized.SUPERBLOCK", {kSuperblock}},
      {"quantized.NF4_CODE", listed(kCode)},
      {"quantized.NF4_THRESHOLDS", listed(kThresholds)}};
}

} // namespace petl
