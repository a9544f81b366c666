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

constexpr float kCode[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// A value above kThresholds[i] has a code above i.
constexpr float kThresholds[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
    -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
    0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f,
    0.5016634166240692f, 0.6427869200706482f, 0.8614784178118011f};

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
