#include "quantised.h"

#include <algorithm>

#include "convert.h"

namespace petl {
namespace {

constexpr int kLanes = 32, kThreads = 256, kWarps = kThreads / kLanes;
constexpr unsigned kAll = 0xffffffffu;
// A thread takes 8 neighbouring values: one or two 16-byte loads of a weight, four bytes of nibbles.
constexpr int kRun = 8;
constexpr int kBlock = 64; // values of nf4 that share an absmax
constexpr int kLanesOfBlock = kBlock / kRun;
constexpr int kScaleBlock = kThreads; // absmaxes that share a scale
constexpr int kMapSize = 256;
constexpr int64_t kMaxSums = kThreads; // parts of the sum of absmaxes

// QLoRA's code book, and what a value must exceed to have a code above i.
__constant__ const float kCode[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
__constant__ const float kThresholds[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};

template <typename T>
struct alignas(16) Run {
  T values[kRun];
};

bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

unsigned blocks_for(int64_t work, int64_t of_a_block) {
  return static_cast<unsigned>((work + of_a_block - 1) / of_a_block);
}

// |value| as an integer: of the same order, and NaN, above all others, survives every max.
__device__ unsigned magnitude(float value) {
  return __float_as_uint(fabsf(value));
}

template <int kWidth>
__device__ unsigned max_of_lanes(unsigned value) {
#pragma unroll
  for (int apart = kWidth / 2; apart > 0; apart /= 2) {
    value = max(value, __shfl_xor_sync(kAll, value, apart));
  }
  return value;
}

__device__ float over(float value, float largest) {
  return __fdiv_rn(value, largest == 0.0f ? 1.0f : largest);
}

// ---- int8 ----

// One warp a row, which it reads twice, the second time from cache.
template <typename T, int kStep>
__global__ void quantise_rows(const T* weight, int64_t rows, int64_t columns, int8_t* data, float* scale) {
  struct alignas(kStep == kRun ? 16 : sizeof(T)) Values {
    T of[kStep];
  };
  struct alignas(kStep) Bytes {
    int8_t of[kStep];
  };
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) {
    return; // the whole warp
  }
  const auto* values = reinterpret_cast<const Values*>(weight + row * columns);
  auto* bytes = reinterpret_cast<Bytes*>(data + row * columns);
  unsigned largest = 0;
  for (int64_t i = threadIdx.x; i < columns / kStep; i += kLanes) {
    const Values run = values[i];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      largest = max(largest, magnitude(widen(run.of[j])));
    }
  }
  const float absmax = __uint_as_float(max_of_lanes<kLanes>(largest));
  const float unit = absmax == 0.0f ? 1.0f : __fdiv_rn(absmax, 127.0f);
  for (int64_t i = threadIdx.x; i < columns / kStep; i += kLanes) {
    const Values run = values[i];
    Bytes out;
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      out.of[j] = static_cast<int8_t>(__float2int_rn(__fdiv_rn(widen(run.of[j]), unit)));
    }
    bytes[i] = out;
  }
  if (threadIdx.x == 0) {
    scale[row] = unit;
  }
}

template <typename T>
__global__ void dequantise_runs_int8(
    const int8_t* data, const float* scale, uint32_t runs, uint32_t row_runs, T* out) {
  struct alignas(kRun) Bytes {
    int8_t of[kRun];
  };
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x; // a division of 32 bits, not of 64
  if (i < runs) {
    const Bytes bytes = reinterpret_cast<const Bytes*>(data)[i];
    const float unit = scale[i / row_runs];
    Run<T> run;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      run.values[j] = narrow<T>(static_cast<float>(bytes.of[j]) * unit);
    }
    reinterpret_cast<Run<T>*>(out)[i] = run;
  }
}

template <typename T>
__global__ void dequantise_values_int8(
    const int8_t* data, const float* scale, int64_t values, int64_t columns, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < values) {
    out[i] = narrow<T>(static_cast<float>(data[i]) * scale[i / columns]);
  }
}

// ---- nf4 ----

// Eight lanes share a block of 64 values. What lies after the end counts as zeros.
template <typename T>
__global__ void quantise_blocks(const T* weight, int64_t values, bool wide, uint8_t* data, float* absmax) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = i * kRun;
  Run<T> run;
  if (wide && first + kRun <= values) {
    run = reinterpret_cast<const Run<T>*>(weight)[i];
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      run.values[j] = first + j < values ? weight[first + j] : narrow<T>(0.0f);
    }
  }
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    bits = max(bits, magnitude(widen(run.values[j])));
  }
  const float largest = __uint_as_float(max_of_lanes<kLanesOfBlock>(bits));

  uint8_t packed[kRun / 2];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float value = over(widen(run.values[j]), largest);
    int nibble = 0;
#pragma unroll
    for (int k = 0; k < 15; ++k) {
      nibble += value > kThresholds[k];
    }
    packed[j / 2] = static_cast<uint8_t>(j % 2 == 0 ? nibble << 4 : packed[j / 2] | nibble);
  }
  if (first + kRun <= values) {
    // data comes from an allocator, and first / 2 is a multiple of 4
    *reinterpret_cast<uchar4*>(data + first / 2) = make_uchar4(packed[0], packed[1], packed[2], packed[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kRun / 2; ++j) {
      if (first + 2 * j < values) {
        data[first / 2 + j] = packed[j];
      }
    }
  }
  if (first < values && i % kLanesOfBlock == 0) {
    absmax[first / kBlock] = largest;
  }
}

// The sum of kThreads numbers of a block, in an order that never changes; all threads get it.
__device__ double sum_of_threads(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
  }
  return sums[0];
}

__global__ void sum_absmaxes(const float* absmax, int64_t blocks, double* sums) {
  double sum = 0.0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < blocks;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += absmax[i];
  }
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// A thread block quantises the absmaxes that share a scale.
__global__ void quantise_absmaxes(
    const float* absmax, int64_t blocks, const double* sums, int parts, const float* map, uint8_t* out, float* scale,
    float* offset) {
  __shared__ float middles[kMapSize];
  __shared__ unsigned largest_of[kWarps];
  const int thread = threadIdx.x;
  const float next = map[min(thread + 1, kMapSize - 1)];
  middles[thread] = (map[thread] + next) / 2.0f;
  const double sum = sum_of_threads(thread < parts ? sums[thread] : 0.0);
  const float mean = static_cast<float>(sum / static_cast<double>(blocks));

  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScaleBlock + thread;
  const float apart = i < blocks ? absmax[i] - mean : 0.0f;
  const unsigned of_warp = max_of_lanes<kLanes>(magnitude(apart));
  if (thread % kLanes == 0) {
    largest_of[thread / kLanes] = of_warp;
  }
  __syncthreads();
  unsigned bits = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    bits = max(bits, largest_of[warp]);
  }
  const float largest = __uint_as_float(bits), value = over(apart, largest);
  // How many of the 255 middles lie below the value.
  int below = 0;
  for (int step = kMapSize / 2; step > 0; step /= 2) {
    below += middles[below + step - 1] < value ? step : 0;
  }
  if (i < blocks) {
    out[i] = static_cast<uint8_t>(below);
  }
  if (thread == 0) {
    scale[blockIdx.x] = largest;
    if (blockIdx.x == 0) {
      *offset = mean;
    }
  }
}

// Tables of a thread block, and the absmaxes of blocks of values: product and sum are rounded one after the other.
struct Absmaxes {
  const uint8_t* absmax;
  const float* scale;
  const float* offset;
};

struct Tables {
  float map[kMapSize], code[16];
};

__device__ void fill(Tables& tables, const float* map) {
  tables.map[threadIdx.x] = map[threadIdx.x];
  if (threadIdx.x < 16) {
    tables.code[threadIdx.x] = kCode[threadIdx.x];
  }
  __syncthreads();
}

__device__ float absmax_of(const Tables& tables, const Absmaxes& from, int64_t block) {
  const float part = __fmul_rn(tables.map[from.absmax[block]], from.scale[block / kScaleBlock]);
  return __fadd_rn(part, *from.offset);
}

// kRuns runs a thread, kThreads runs apart: loads and stores of a warp have no gaps.
constexpr int kRuns = 4;

template <typename T>
__global__ void dequantise_runs_nf4(
    const uint8_t* data, Absmaxes from, const float* map, int64_t first, int64_t runs, T* out) {
  __shared__ Tables tables;
  fill(tables, map);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads * kRuns + threadIdx.x;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = start + r * kThreads;
    if (i < runs) {
      const uchar4 bytes = reinterpret_cast<const uchar4*>(data + first / 2)[i];
      const float largest = absmax_of(tables, from, (first + i * kRun) / kBlock);
      const unsigned char packed[kRun / 2] = {bytes.x, bytes.y, bytes.z, bytes.w};
      Run<T> run;
#pragma unroll
      for (int j = 0; j < kRun / 2; ++j) {
        run.values[2 * j] = narrow<T>(tables.code[packed[j] >> 4] * largest);
        run.values[2 * j + 1] = narrow<T>(tables.code[packed[j] & 15] * largest);
      }
      reinterpret_cast<Run<T>*>(out)[i] = run;
    }
  }
}

template <typename T>
__global__ void dequantise_values_nf4(
    const uint8_t* data, Absmaxes from, const float* map, int64_t first, int64_t values, T* out) {
  __shared__ Tables tables;
  fill(tables, map);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < values) {
    const int64_t value = first + i;
    const int nibble = data[value / 2] >> (value % 2 == 0 ? 4 : 0) & 15;
    out[i] = narrow<T>(tables.code[nibble] * absmax_of(tables, from, value / kBlock));
  }
}

// ---- launches ----

template <typename T>
cudaError_t run_quantise_int8(
    const void* weight, int64_t rows, int64_t columns, int8_t* data, float* scale, cudaStream_t stream) {
  const bool wide = columns % kRun == 0 && aligned(weight, 16) && aligned(data, kRun);
  const auto kernel = wide ? quantise_rows<T, kRun> : quantise_rows<T, 1>;
  if (rows > 0) {
    kernel<<<blocks_for(rows, kWarps), dim3(kLanes, kWarps), 0, stream>>>(
        static_cast<const T*>(weight), rows, columns, data, scale);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_quantise_blocks(
    const void* weight, int64_t values, uint8_t* data, float* absmax, cudaStream_t stream) {
  quantise_blocks<T><<<blocks_for(values, kThreads * kRun), kThreads, 0, stream>>>(
      static_cast<const T*>(weight), values, aligned(weight, 16), data, absmax);
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_dequantise_int8(
    const int8_t* data, const float* scale, int64_t rows, int64_t columns, void* out, cudaStream_t stream) {
  const int64_t values = rows * columns;
  const bool wide = columns % kRun == 0 && aligned(data, kRun) && aligned(out, 16);
  if (values > 0 && wide && values / kRun <= UINT32_MAX - kThreads) {
    dequantise_runs_int8<T><<<blocks_for(values / kRun, kThreads), kThreads, 0, stream>>>(
        data,
        scale,
        static_cast<uint32_t>(values / kRun),
        static_cast<uint32_t>(columns / kRun),
        static_cast<T*>(out));
  } else if (values > 0) {
    dequantise_values_int8<T><<<blocks_for(values, kThreads), kThreads, 0, stream>>>(
        data, scale, values, columns, static_cast<T*>(out));
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_dequantise_nf4(
    const uint8_t* data,
    const Absmaxes& from,
    const float* map,
    int64_t first,
    int64_t values,
    void* out,
    cudaStream_t stream) {
  if (values > 0 && first % kRun == 0 && values % kRun == 0 && aligned(data, 4) && aligned(out, 16)) {
    dequantise_runs_nf4<T><<<blocks_for(values / kRun, kThreads * kRuns), kThreads, 0, stream>>>(
        data, from, map, first, values / kRun, static_cast<T*>(out));
  } else if (values > 0) {
    dequantise_values_nf4<T><<<blocks_for(values, kThreads), kThreads, 0, stream>>>(
        data, from, map, first, values, static_cast<T*>(out));
  }
  return cudaGetLastError();
}

int64_t blocks_of(int64_t values) {
  return (values + kBlock - 1) / kBlock;
}

} // namespace

cudaError_t quantise_int8(
    const void* weight,
    FloatType type,
    int64_t rows,
    int64_t columns,
    int8_t* data,
    float* scale,
    cudaStream_t stream) {
  switch (type) {
    case FloatType::fp32:
      return run_quantise_int8<float>(weight, rows, columns, data, scale, stream);
    case FloatType::fp16:
      return run_quantise_int8<__half>(weight, rows, columns, data, scale, stream);
    case FloatType::bf16:
      return run_quantise_int8<__nv_bfloat16>(weight, rows, columns, data, scale, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int64_t quantise_nf4_workspace(int64_t values) {
  return kMaxSums * static_cast<int64_t>(sizeof(double)) + blocks_of(values) * static_cast<int64_t>(sizeof(float));
}

cudaError_t quantise_nf4(
    const void* weight,
    FloatType type,
    int64_t values,
    const float* map,
    uint8_t* data,
    uint8_t* absmax,
    float* absmax_scale,
    float* absmax_offset,
    void* workspace,
    cudaStream_t stream) {
  if (values == 0) {
    return cudaSuccess;
  }
  auto* sums = static_cast<double*>(workspace);
  auto* absmaxes = reinterpret_cast<float*>(sums + kMaxSums);
  cudaError_t error = cudaErrorInvalidValue;
  switch (type) {
    case FloatType::fp32:
      error = run_quantise_blocks<float>(weight, values, data, absmaxes, stream);
      break;
    case FloatType::fp16:
      error = run_quantise_blocks<__half>(weight, values, data, absmaxes, stream);
      break;
    case FloatType::bf16:
      error = run_quantise_blocks<__nv_bfloat16>(weight, values, data, absmaxes, stream);
      break;
    default:
      break;
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t blocks = blocks_of(values);
  const unsigned groups = blocks_for(blocks, kScaleBlock);
  const unsigned parts = std::min<unsigned>(groups, kMaxSums);
  sum_absmaxes<<<parts, kThreads, 0, stream>>>(absmaxes, blocks, sums);
  quantise_absmaxes<<<groups, kThreads, 0, stream>>>(
      absmaxes, blocks, sums, static_cast<int>(parts), map, absmax, absmax_scale, absmax_offset);
  return cudaGetLastError();
}

cudaError_t dequantise_int8(
    const int8_t* data,
    const float* scale,
    int64_t first_row,
    int64_t rows,
    int64_t columns,
    FloatType type,
    void* out,
    cudaStream_t stream) {
  data += first_row * columns;
  scale += first_row;
  switch (type) {
    case FloatType::fp32:
      return run_dequantise_int8<float>(data, scale, rows, columns, out, stream);
    case FloatType::fp16:
      return run_dequantise_int8<__half>(data, scale, rows, columns, out, stream);
    case FloatType::bf16:
      return run_dequantise_int8<__nv_bfloat16>(data, scale, rows, columns, out, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t dequantise_nf4(
    const uint8_t* data,
    const uint8_t* absmax,
    const float* absmax_scale,
    const float* absmax_offset,
    const float* map,
    int64_t first,
    int64_t values,
    FloatType type,
    void* out,
    cudaStream_t stream) {
  const Absmaxes from{absmax, absmax_scale, absmax_offset};
  switch (type) {
    case FloatType::fp32:
      return run_dequantise_nf4<float>(data, from, map, first, values, out, stream);
    case FloatType::fp16:
      return run_dequantise_nf4<__half>(data, from, map, first, values, out, stream);
    case FloatType::bf16:
      return run_dequantise_nf4<__nv_bfloat16>(data, from, map, first, values, out, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

} // namespace petl
