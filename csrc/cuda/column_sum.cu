#include "column_sum.h"

#include <algorithm>

#include "convert.h"

namespace petl {
namespace {

// One thread block: kColumns neighbouring columns (so that loads coalesce) times kLanes rows at a time.
constexpr int kColumns = 32, kLanes = 16;
// The first pass cuts the rows into at most this many runs, each summed by one block per strip of columns.
constexpr int64_t kMaxRuns = 64, kMinRunRows = 128;

int64_t runs_of(int64_t rows) {
  return std::clamp<int64_t>((rows + kMinRunRows - 1) / kMinRunRows, 1, kMaxRuns);
}

// sums[run * columns + j] = Σ over the rows of one run. The order of the additions is fixed by the launch alone.
template <typename T, typename Sum>
__global__ void sum_runs(const T* matrix, int64_t rows, int64_t columns, int64_t run_rows, Sum* sums) {
  __shared__ Sum lanes[kLanes][kColumns + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * run_rows;
  const int64_t stop = min(rows, first + run_rows);
  Sum sum = 0;
  if (column < columns) {
    for (int64_t row = first + threadIdx.y; row < stop; row += kLanes) {
      sum += widen(matrix[row * columns + column]);
    }
  }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int half = kLanes / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      lanes[threadIdx.y][threadIdx.x] += lanes[threadIdx.y + half][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && column < columns) {
    sums[blockIdx.y * columns + column] = lanes[0][threadIdx.x];
  }
}

template <typename T, typename Sum>
cudaError_t launch(
    const void* matrix, int64_t rows, int64_t columns, void* sums, void* workspace, cudaStream_t stream) {
  if (columns == 0) {
    return cudaSuccess;
  }
  const int64_t runs = runs_of(rows);
  const dim3 block(kColumns, kLanes);
  const unsigned strips = static_cast<unsigned>((columns + kColumns - 1) / kColumns);
  Sum* partial = static_cast<Sum*>(runs == 1 ? sums : workspace);
  sum_runs<T, Sum><<<dim3(strips, static_cast<unsigned>(runs)), block, 0, stream>>>(
      static_cast<const T*>(matrix), rows, columns, (rows + runs - 1) / runs, partial);
  if (runs > 1) {
    sum_runs<Sum, Sum><<<dim3(strips, 1), block, 0, stream>>>(partial, runs, columns, runs, static_cast<Sum*>(sums));
  }
  return cudaGetLastError();
}

} // namespace

int64_t column_sum_workspace(int64_t rows, int64_t columns) {
  const int64_t runs = runs_of(rows);
  return runs == 1 ? 0 : runs * columns;
}

cudaError_t column_sum(
    const void* matrix,
    FloatType type,
    int64_t rows,
    int64_t columns,
    void* sums,
    void* workspace,
    cudaStream_t stream) {
  switch (type) {
    case FloatType::fp32:
      return launch<float, float>(matrix, rows, columns, sums, workspace, stream);
    case FloatType::fp64:
      return launch<double, double>(matrix, rows, columns, sums, workspace, stream);
    case FloatType::fp16:
      return launch<__half, float>(matrix, rows, columns, sums, workspace, stream);
    case FloatType::bf16:
      return launch<__nv_bfloat16, float>(matrix, rows, columns, sums, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace petl
