// The formulas, the layout of the parts and the constants' meaning are in petl_kernels/ops/quantized.
//
// The products go over tiles of the weight that are made in scratch memory and stay in the second cache. A block of NF4 has 16 values: they are scaled and rounded once, and its 64 numbers are looked up among them.
#include <ATen/Functions.h>

#include <cmath>

#include "kernel.h"
#include "product.h"
#include "shared.h"
#include "weight.h"

#ifdef CPU_CAPABILITY_AVX2
#include <immintrin.h>
#endif

namespace petl {
namespace {

size_t part_count(Storage storage) {
  return storage == Storage::dense ? 1 : storage == Storage::int8 ? 2 : 4;
}

constexpr int64_t kBackRows = 1024;  // rows whose fp32 sums exist at a time
constexpr int64_t kLeastColumns = 256;  // of a tile with all rows: the library is slow with fewer

// The same operations as in Python, for the same bits.
const Tensor& dynamic_map() {
  static const Tensor map = [] {
    // fp32 on the CPU, whatever the defaults of the caller are
    const auto options = at::TensorOptions().dtype(at::kFloat).device(at::kCPU);
    std::vector<Tensor> entries = {at::tensor({0.0f, 1.0f}, options)};
    for (int i = 0; i < 7; ++i) {
      const Tensor bounds = at::linspace(0.1, 1, (1 << i) + 1, options);
      const Tensor middles = (bounds.slice(0, 0, -1) + bounds.slice(0, 1)) / 2 * std::pow(10.0, i - 6);
      entries.push_back(middles);
      entries.push_back(-middles);
    }
    return std::get<0>(at::cat(entries).sort()).contiguous();
  }();
  return map;
}

// ---- one block of NF4 -----------------------------------------------------------------------------------------------

struct Nf4 {
  explicit Nf4(at::TensorList parts)
      : data(parts[0].const_data_ptr<uint8_t>()),
        absmax(parts[1].const_data_ptr<uint8_t>()),
        scale(parts[2].const_data_ptr<float>()),
        offset(*parts[3].const_data_ptr<float>()),
        map(dynamic_map().const_data_ptr<float>()),
        whole_blocks(parts[0].numel() * 2 / kBlock) {}

  float largest(int64_t block) const {
    // Rounded after the product, as PyTorch rounds it: the compiler may not fuse it with the sum.
    volatile float product = map[absmax[block]] * scale[block / kSuperblock];
    return product + offset;
  }

  const uint8_t *data, *absmax;
  const float* scale;
  float offset;
  const float* map;
  int64_t whole_blocks;
};

// out[j] = table[nibble j] for the 64 nibbles of a block.
template <typename T>
void look_up(const uint8_t* bytes, const T* table, T* out) {
#ifdef CPU_CAPABILITY_AVX2
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i four = _mm256_set1_epi8(15);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), four), low = _mm256_and_si256(packed, four);
  // In the halves of each: nibbles 0 to 15 and 32 to 47, 16 to 31 and 48 to 63.
  const __m256i index[2] = {_mm256_unpacklo_epi8(high, low), _mm256_unpackhi_epi8(high, low)};
  if constexpr (sizeof(T) == 2) {
    // The table's low bytes and its high bytes, each in one register.
    const __m128i t0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i t1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
    const __m128i byte = _mm_set1_epi16(255);
    const __m256i lows =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(t0, byte), _mm_and_si128(t1, byte)));
    const __m256i highs =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(t0, 8), _mm_srli_epi16(t1, 8)));
    const auto store = [&](int64_t first, __m256i values) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + first), _mm256_castsi256_si128(values));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + first + 32), _mm256_extracti128_si256(values, 1));
    };
    for (int half = 0; half < 2; ++half) {
      const __m256i l = _mm256_shuffle_epi8(lows, index[half]), h = _mm256_shuffle_epi8(highs, index[half]);
      store(16 * half, _mm256_unpacklo_epi8(l, h));
      store(16 * half + 8, _mm256_unpackhi_epi8(l, h));
    }
    return;
  } else if constexpr (std::is_same_v<T, float>) {
    alignas(32) uint8_t indices[64];
    for (int half = 0; half < 2; ++half) {
      _mm_store_si128(reinterpret_cast<__m128i*>(indices + 16 * half), _mm256_castsi256_si128(index[half]));
      _mm_store_si128(reinterpret_cast<__m128i*>(indices + 16 * half + 32), _mm256_extracti128_si256(index[half], 1));
    }
    const __m256 t0 = _mm256_loadu_ps(table), t1 = _mm256_loadu_ps(table + 8);
    for (int j = 0; j < 64; j += 8) {
      const __m256i eight =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(indices + j)));
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28));  // the sign: whether above 7
      const __m256 values =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(t0, eight), _mm256_permutevar8x32_ps(t1, eight), upper);
      _mm256_storeu_ps(out + j, values);
    }
    return;
  }
#endif
  for (int64_t j = 0; j < kBlock / 2; ++j) {
    out[2 * j] = table[bytes[j] >> 4];
    out[2 * j + 1] = table[bytes[j] & 15];
  }
}

// The numbers [begin, end) of the flattened weight.
template <typename T>
void dequantize_nf4(const Nf4& weight, int64_t begin, int64_t end, T* out) {
  alignas(32) float scaled[16];
  alignas(32) T table[16], values[kBlock];
  for (int64_t at = begin; at < end;) {
    const int64_t block = at / kBlock, first = block * kBlock, stop = std::min(end, first + kBlock);
    const float largest = weight.largest(block);
    for (int j = 0; j < 16; ++j) {
      scaled[j] = kCode[j] * largest;
    }
    convert(scaled, table, 16);
    if (stop - at == kBlock) {
      look_up(weight.data + at / 2, table, out + (at - begin));
      at = stop;
    } else if (block < weight.whole_blocks) {
      look_up(weight.data + first / 2, table, values);
      std::copy(values + (at - first), values + (stop - first), out + (at - begin));
      at = stop;
    }
    for (; at < stop; ++at) {
      const uint8_t byte = weight.data[at / 2];
      out[at - begin] = table[at % 2 == 0 ? byte >> 4 : byte & 15];
    }
  }
}

template <typename T>
void dequantize_int8(const int8_t* data, float scale, int64_t count, T* out) {
  constexpr int64_t kPiece = 1024;
  alignas(64) float buffer[kPiece];
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t piece = std::min(kPiece, count - first);
    float* values = in_place_or(out + first, buffer);
    for (int64_t j = 0; j < piece; ++j) {
      values[j] = static_cast<float>(data[first + j]) * scale;
    }
    settle(values, out + first, piece);
  }
}

// Some columns of one row of a quantized weight (·, in).
template <typename T>
void dequantize_row(at::TensorList parts, int64_t in, int64_t row, int64_t column, int64_t count, T* out) {
  const int64_t at = row * in + column;
  if (storage_of(parts[0]) == Storage::nf4) {
    dequantize_nf4(Nf4(parts), at, at + count, out);
  } else {
    dequantize_int8(parts[0].const_data_ptr<int8_t>() + at, parts[1].const_data_ptr<float>()[row], count, out);
  }
}

// The rows and columns of a quantized weight (·, in) from these on, into out, which is contiguous; by all threads.
void dequantize_into(const Tensor& out, at::TensorList parts, int64_t in, int64_t first_row, int64_t first_column = 0) {
  const int64_t columns = out.size(1), grain = std::max<int64_t>(1, 32768 / columns);
  PETL_DISPATCH_FLOATING(out.scalar_type(), "dequantize", [&] {
    auto* data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, out.size(0), grain, [&](int64_t begin, int64_t end) {
      if (storage_of(parts[0]) == Storage::nf4 && columns == in) {
        return dequantize_nf4(Nf4(parts), (first_row + begin) * in, (first_row + end) * in, data + begin * in);
      }
      for (int64_t row = begin; row < end; ++row) {
        dequantize_row(parts, in, first_row + row, first_column, columns, data + row * columns);
      }
    });
  });
}

// f(first row of Ŵ, the tile (rows, in) from there), through the whole of a quantized weight, in one scratch.
template <typename F>
void for_each_tile(const Weight& weight, const at::TensorOptions& options, const F& f) {
  const int64_t row_bytes = weight.in * static_cast<int64_t>(options.dtype().itemsize());
  const int64_t size = std::min(weight.out, std::max<int64_t>(1, kTileBytes / row_bytes));
  const Tensor scratch = at::empty({size, weight.in}, options);
  for (int64_t first = 0; first < weight.out; first += size) {
    const Tensor tile = scratch.narrow(0, 0, std::min(size, weight.out - first));
    dequantize_into(tile, weight.parts, weight.in, first);
    f(first, tile);
  }
}

// How many columns of Ŵ a tile with all its rows has, in whole blocks of NF4; 0 where they would be too few.
int64_t tile_columns(const Weight& weight, const Tensor& dy) {
  const int64_t columns = std::min(weight.in, kTileBytes / (weight.out * dy.element_size()) / kBlock * kBlock);
  return columns >= std::min(weight.in, kLeastColumns) ? columns : 0;
}

// out (rows, in) = or += dy (rows, out) Ŵ, some columns of out at a time: no sum is cut.
void multiply_columns(Tensor out, const Tensor& dy, const Weight& weight, bool add) {
  const int64_t size = tile_columns(weight, dy);
  const Tensor scratch = at::empty({weight.out * size}, dy.options());
  for (int64_t first = 0; first < weight.in; first += size) {
    const int64_t count = std::min(size, weight.in - first);
    const Tensor tile = scratch.narrow(0, 0, weight.out * count).view({weight.out, count});
    dequantize_into(tile, weight.parts, weight.in, 0, first);
    product_out(out.narrow(1, first, count), dy, tile, add);
  }
}

// out (rows, in) = or += dy (rows, out) Ŵ where sums over the tiles are as wide as out.
void add_tiles(Tensor out, const Tensor& dy, const Weight& weight, bool add) {
  for_each_tile(weight, dy.options(), [&](int64_t first, const Tensor& tile) {
    product_out(out, dy.narrow(1, first, tile.size(0)), tile, add || first > 0);
  });
}

// The same for 16-bit numbers, with fp32 sums over the tiles.
void add_tiles_wide(Tensor out, const Tensor& dy, const Weight& weight, bool add) {
  const Tensor total = at::empty({dy.size(0), weight.in}, dy.options().dtype(at::kFloat));
  if (add) {
    total.copy_(out);
  }
  add_tiles(total, dy, weight, add);
  out.copy_(total);
}

} // namespace

// ---- a weight in any storage ----------------------------------------------------------------------------------------

Storage storage_of(const Tensor& first_part) {
  const auto dtype = first_part.scalar_type();
  return dtype == at::kChar ? Storage::int8 : dtype == at::kByte ? Storage::nf4 : Storage::dense;
}

Weight weight_with_in(at::TensorList parts, int64_t in) {
  return {parts, parts[0].dim() == 2 ? parts[0].size(0) : 2 * parts[0].size(0) / in, in};
}

Weight weight_with_out(at::TensorList parts, int64_t out) {
  return {parts, out, parts[0].dim() == 2 ? parts[0].size(1) : 2 * parts[0].size(0) / out};
}

std::vector<Weight> weights_with_in(at::TensorList flat, int64_t in) {
  std::vector<Weight> weights;
  for (size_t first = 0; first < flat.size();) {
    const size_t size = part_count(storage_of(flat[first]));
    weights.push_back(weight_with_in(flat.slice(first, size), in));
    first += size;
  }
  return weights;
}

Tensor project(const Tensor& x, const Weight& weight, const OptionalTensor& bias) {
  if (weight.dense() && !widens(x.scalar_type())) {
    return at::linear(x, weight.parts[0], bias);
  }
  Tensor y = empty({x.size(0), weight.out}, x.scalar_type());
  project_out(y, x, weight, bias);
  return y;
}

void project_out(Tensor out, const Tensor& x, const Weight& weight, const OptionalTensor& bias) {
  if (weight.dense()) {
    return product_out(out, x, MatrixView(weight.parts[0]).t(), /*add=*/false, /*scale=*/1, bias);
  }
  for_each_tile(weight, x.options(), [&](int64_t first, const Tensor& tile) {
    const int64_t count = tile.size(0);
    const OptionalTensor added = bias ? OptionalTensor(bias->narrow(0, first, count)) : std::nullopt;
    product_out(out.narrow(1, first, count), x, tile.t(), /*add=*/false, /*scale=*/1, added);
  });
}

Tensor project_back(const Tensor& dy, const Weight& weight) {
  Tensor dx = empty({dy.size(0), weight.in}, dy.scalar_type());
  project_back_out(dx, dy, weight);
  return dx;
}

void project_back_out(Tensor out, const Tensor& dy, const Weight& weight, bool add) {
  if (weight.dense()) {
    product_out(out, dy, weight.parts[0], add);
  } else if (tile_columns(weight, dy) > 0) {
    multiply_columns(out, dy, weight, add);
  } else if (dy.element_size() > 2) {
    add_tiles(out, dy, weight, add);
  } else {
    Blocks(dy.size(0), kBackRows).for_each(0, at::divup(dy.size(0), kBackRows), [&](int64_t row, int64_t count) {
      add_tiles_wide(out.narrow(0, row, count), dy.narrow(0, row, count), weight, add);
    });
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

Tensor quantized_project(const Tensor& rows, at::TensorList parts, const OptionalTensor& bias) {
  return project(rows, weight_with_in(parts, rows.size(1)), bias);
}

Tensor quantized_project_back(const Tensor& rows, at::TensorList parts) {
  return project_back(rows, weight_with_out(parts, rows.size(1)));
}

Tensor dequantize(at::TensorList parts, int64_t first_row, int64_t rows, int64_t columns, at::ScalarType dtype) {
  Tensor out = at::empty({rows, columns}, parts[0].options().dtype(dtype));
  dequantize_into(out, parts, columns, first_row);
  return out;
}

Tensor quantized_embedding(const Tensor& ids, at::TensorList parts, int64_t columns, at::ScalarType dtype) {
  const Tensor flat = ids.reshape({-1}).to(at::kLong).contiguous();
  const int64_t rows = weight_with_in(parts, columns).out, count = flat.size(0);
  const int64_t* row = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < rows, "index out of range in self");
  }
  Tensor out = at::empty({count, columns}, parts[0].options().dtype(dtype));
  const int64_t grain = std::max<int64_t>(1, 32768 / columns);
  PETL_DISPATCH_FLOATING(dtype, "quantized_embedding", [&] {
    auto* data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        dequantize_row(parts, columns, row[i], 0, columns, data + i * columns);
      }
    });
  });
  return out;
}

std::vector<Tensor> quantize_int8(const Tensor& weight) {
  const Tensor rows = weight.contiguous();
  const int64_t count = rows.size(0), columns = rows.size(1);
  Tensor data = at::empty(rows.sizes(), rows.options().dtype(at::kChar));
  Tensor scale = at::empty({count}, rows.options().dtype(at::kFloat));
  PETL_DISPATCH_FLOATING(rows.scalar_type(), "quantize_int8", [&] {
    using Vec = at::vec::Vectorized<float>;
    const auto* from = rows.const_data_ptr<scalar_t>();
    auto* to = data.mutable_data_ptr<int8_t>();
    auto* scales = scale.mutable_data_ptr<float>();
    const Scratch<float> row_buffer(columns);
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
      float* values = row_buffer.mine();
      for (int64_t row = begin; row < end; ++row) {
        convert(from + row * columns, values, columns);
        const float largest = at::vec::map_reduce_all<float>(
            [](Vec v) { return v.abs(); }, [](Vec a, Vec b) { return at::vec::maximum(a, b); }, values, columns);
        const float step = scales[row] = largest == 0 ? 1.0f : largest / 127;
        at::vec::map<float>([&](Vec v) { return (v / Vec(step)).round(); }, values, values, columns);
        for (int64_t j = 0; j < columns; ++j) {
          to[row * columns + j] = static_cast<int8_t>(static_cast<int32_t>(values[j]));
        }
      }
    });
  });
  return {data, scale};
}

namespace {

// blocks / largest in rows, and 0 where a block is all zeros.
Tensor over(const Tensor& blocks, const Tensor& largest) {
  return blocks / at::where(largest == 0, at::ones({}), largest).unsqueeze(1);
}

// [absmax, absmax_scale, absmax_offset]: so few numbers that PyTorch's own operations do.
std::vector<Tensor> quantize_absmax(const Tensor& absmax) {
  const Tensor offset = absmax.mean({0}, /*keepdim=*/true, at::kDouble).to(at::kFloat);
  const int64_t count = absmax.size(0), padding = at::divup(count, kSuperblock) * kSuperblock - count;
  const Tensor blocks = at::constant_pad_nd(absmax - offset, {0, padding}).view({-1, kSuperblock});
  const Tensor scale = blocks.abs().amax(1);
  const Tensor& map = dynamic_map();
  const Tensor middles = (map.slice(0, 0, -1) + map.slice(0, 1)) / 2;
  const Tensor indices = at::bucketize(over(blocks, scale), middles, /*out_int32=*/true);
  return {indices.view({-1}).slice(0, 0, count).to(at::kByte), scale, offset};
}

// The nibbles of a block of 64 (zeros after its end) into 32 bytes; returns its largest magnitude.
float quantize_block(const float* values, uint8_t* bytes) {
  using Vec = at::vec::Vectorized<float>;
  const float largest = at::vec::map_reduce_all<float>(
      [](Vec v) { return v.abs(); }, [](Vec a, Vec b) { return at::vec::maximum(a, b); }, values, kBlock);
  const float divisor = largest == 0 ? 1.0f : largest;
  alignas(64) float scaled[kBlock];
  alignas(64) int32_t nibbles[kBlock] = {};
  for (int64_t j = 0; j < kBlock; ++j) {
    scaled[j] = values[j] / divisor;
  }
  for (const float threshold : kThresholds) {
    for (int64_t j = 0; j < kBlock; ++j) {
      nibbles[j] += scaled[j] > threshold;
    }
  }
  for (int64_t j = 0; j < kBlock / 2; ++j) {
    bytes[j] = static_cast<uint8_t>(nibbles[2 * j] << 4 | nibbles[2 * j + 1]);
  }
  return largest;
}

} // namespace

std::vector<Tensor> quantize_nf4(const Tensor& weight) {
  const Tensor flat = weight.contiguous().view({-1});
  const int64_t count = flat.size(0), blocks = at::divup(count, kBlock);
  Tensor data = at::empty({at::divup(count, 2)}, flat.options().dtype(at::kByte));
  Tensor absmax = at::empty({blocks}, flat.options().dtype(at::kFloat));
  PETL_DISPATCH_FLOATING(flat.scalar_type(), "quantize_nf4", [&] {
    const auto* from = flat.const_data_ptr<scalar_t>();
    auto* to = data.mutable_data_ptr<uint8_t>();
    auto* largest = absmax.mutable_data_ptr<float>();
    at::parallel_for(0, blocks, 512, [&](int64_t begin, int64_t end) {
      alignas(64) float values[kBlock];
      alignas(64) uint8_t bytes[kBlock / 2];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlock, size = std::min(kBlock, count - first);
        convert(from + first, values, size);
        std::fill(values + size, values + kBlock, 0.0f);
        largest[block] = quantize_block(values, bytes);
        std::copy_n(bytes, at::divup(size, 2), to + first / 2);
      }
    });
  });
  std::vector<Tensor> parts = quantize_absmax(absmax);
  parts.insert(parts.begin(), data);
  return parts;
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(quantize_int8);
  PETL_KERNEL(quantize_nf4);
  PETL_KERNEL(dequantize);
  PETL_KERNEL(quantized_project);
  PETL_KERNEL(quantized_project_back);
  PETL_KERNEL(quantized_embedding);
}
