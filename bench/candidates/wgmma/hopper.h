// What the kernel needs of sm_90a, one function for each instruction: mbarriers, TMA, wgmma, registers, stmatrix.
//
// tests/backends/wgmma_emulation/hopper.h has the same functions for a CPU. Facts: PTX ISA 9.0, sections 9.7.9.27
// (cp.async.bulk.tensor), 9.7.13.15 (mbarrier), 9.7.14.5.16 (stmatrix), 9.7.15 (wgmma), 9.7.19.5 (setmaxnreg).
// Shared memory is named by its 32-bit address throughout: no pointer ever goes there.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace hopper {

using TensorMap = CUtensorMap;

struct Half {};
struct Bfloat16 {};

__device__ inline uint32_t shared_memory() {
  extern __shared__ uint8_t dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

__device__ inline void block_sync() { __syncthreads(); }

// --- mbarrier: a phase ends when `count` threads have arrived and as many bytes have come as were announced.

__device__ inline void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes new barriers visible to the copy engine; a block_sync makes them visible to the other threads.
__device__ inline void barriers_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: of phase 0, 2, ... or of phase 1, 3, ... On a new barrier a wait for
// parity 1 returns at once.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// --- TMA: the map's box whose first element is (column, row), zeros outside the matrix, to shared memory. All bytes of
// the box are counted by the barrier, those of zeros too.

__device__ inline void load_box(uint32_t target, const TensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// --- Registers of a warpgroup.

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- wgmma. The compiler knows no more of these instructions than their operands. Naming the accumulators around the
// fence and the wait keeps it from moving what reads or writes them past either.

template <int kSize>
__device__ inline void pin(float (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

template <int kSize>
__device__ inline void products_begin(float (&sums)[kSize]) {
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the committed groups are under way. Sums may be used only after none is.
template <int kPending, int kSize>
__device__ inline void products_wait(float (&sums)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) {
    pin(sums);
  }
}

// sums (64 rows, kSize / 2 columns of the tile in all) += left · right over 16 of the contraction, or = without
// `accumulate`. Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 and 8 below, and of every eight columns
// two: sums[4 j + 2 h + e] is column 8 j + 2 (t % 4) + e of row + 8 h (PTX ISA, figure "m64nNk16, matrix D").
#define SUMS_8(s, i) \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), \
      "+f"(s[i + 7])
#define SUMS_64(s, i) \
  SUMS_8(s, i), SUMS_8(s, i + 8), SUMS_8(s, i + 16), SUMS_8(s, i + 24), SUMS_8(s, i + 32), SUMS_8(s, i + 40), \
      SUMS_8(s, i + 48), SUMS_8(s, i + 56)
#define NAMES_0_TO_63 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64_TO_127 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MULTIPLY_128(type) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_0_TO_63 \
      "}, %64, %65, p, 1, 1, 0, %67;\n}" \
      : SUMS_64(sums, 0) \
      : "l"(left), "l"(right), "r"(accumulate), "n"(kTransposed))
#define MULTIPLY_256(type) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" NAMES_0_TO_63 ", " NAMES_64_TO_127 \
      "}, %128, %129, p, 1, 1, 0, %131;\n}" \
      : SUMS_64(sums, 0), SUMS_64(sums, 64) \
      : "l"(left), "l"(right), "r"(accumulate), "n"(kTransposed))

template <typename Element, int kTransposed>
__device__ inline void multiply(float (&sums)[64], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<Element, Half>) {
    MULTIPLY_128("f16");
  } else {
    MULTIPLY_128("bf16");
  }
}

template <typename Element, int kTransposed>
__device__ inline void multiply(float (&sums)[128], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<Element, Half>) {
    MULTIPLY_256("f16");
  } else {
    MULTIPLY_256("bf16");
  }
}

#undef MULTIPLY_256
#undef MULTIPLY_128
#undef NAMES_64_TO_127
#undef NAMES_0_TO_63
#undef SUMS_64
#undef SUMS_8

// --- The epilogue: rounded sums to shared memory, from there with TMA to the output.

// Four matrices of 8 x 8: lane l has elements 2 (l % 4) and the next of row l / 4 of each, and the address where row
// l % 8 of matrix l / 8 goes, 16 bytes.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Shows what this thread has written to the copy engine.
__device__ inline void writes_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of one warpgroup; number 0 is block_sync's.
__device__ inline void warpgroup_sync(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// What lies outside the matrix is not written.
__device__ inline void store_box(const TensorMap& map, int column, int row, uint32_t source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(source)
               : "memory");
}

__device__ inline void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last kPending groups of this thread's stores have read their shared memory.
template <int kPending>
__device__ inline void stores_wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Two values, rounded, in one word; and back.
template <typename Element>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ inline uint32_t pack<Bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <typename Element>
__device__ inline float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<Half>(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
template <>
__device__ inline float2 unpack<Bfloat16>(uint32_t word) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// --- The host's side.

// The driver's encoder, found at run time: nothing has to be linked against libcuda.
inline const char* encode_map(
    TensorMap& map,
    const void* data,
    int64_t rows,
    int64_t columns,
    int64_t row_bytes,
    bool bf16,
    uint32_t box_rows,
    uint32_t box_columns) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) {
    return "the driver has no cuTensorMapEncodeTiled";
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  const CUtensorMapDataType type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(
      &map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a matrix";
}

template <typename Arguments>
const char* launch(
    void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void* stream, const Arguments& arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

} // namespace hopper
