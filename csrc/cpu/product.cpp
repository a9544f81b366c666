// A product is cut into blocks of the result. A thread that has a block goes down the inner dimension in steps of kDepth:
// it widens so many numbers of the block's rows of left and columns of right, the latter in strips that are as wide as two
// vectors, multiplies tiles of kTileRows rows and one strip in registers, and adds them to the block's sums. A sum goes
// down the inner dimension in the same steps wherever its block begins, so the cut may follow the number of threads: the
// numbers do not change with it.
#include "product.h"

#include "kernel.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace petl {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kTileRows = 6, kTileColumns = 2 * kLanes;  // twelve of sixteen registers hold sums
constexpr int64_t kDepth = 256;
constexpr int64_t kLeftStride = kDepth + 16;  // the rows of a tile begin in different sets of the first cache
constexpr int64_t kBlockRows = 256, kBlockColumns = 256;
constexpr int64_t kWorthThreads = 1 << 20;  // multiplications
constexpr int64_t kPiece = 64;  // numbers of a row that are widened before they are transposed

int64_t rounded_up(int64_t count, int64_t unit) {
  return at::divup(count, unit) * unit;
}

// PyTorch's own answer to whether its library has instructions for a dtype; false where the library was left out.
bool library_multiplies(const char* question) {
  const auto handle = c10::Dispatcher::singleton().findSchema({question, ""});
  return handle && handle->typed<bool()>().call();
}

// A matrix of which either rows or columns lie side by side.
template <typename T>
struct Operand {
  explicit Operand(const MatrixView& matrix)
      : data(static_cast<const T*>(matrix.data)),
        by_rows(matrix.column_stride == 1 || matrix.columns == 1),
        stride(by_rows ? matrix.row_stride : matrix.column_stride) {}

  // The numbers from (row, column) on, in the direction in which they lie.
  const T* at(int64_t row, int64_t column) const {
    return data + (by_rows ? row * stride + column : column * stride + row);
  }

  const T* data;
  bool by_rows;
  int64_t stride;
};

// to = from, in fp32
template <typename T>
void widen(const T* from, float* to, int64_t count) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from + j));
    low.store(to + j);
    high.store(to + j + kLanes);
  }
  for (; j < count; ++j) {
    to[j] = static_cast<float>(from[j]);
  }
}

// A part of left, its rows kLeftStride apart.
template <typename T>
void widen_left(const Operand<T>& left, int64_t row, int64_t rows, int64_t first, int64_t depth, float* to) {
  if (left.by_rows) {
    for (int64_t i = 0; i < rows; ++i) {
      widen(left.at(row + i, first), to + i * kLeftStride, depth);
    }
    return;
  }
  float values[kBlockRows + kTileRows];
  for (int64_t k = 0; k < depth; ++k) {
    widen(left.at(row, first + k), values, rows);
    for (int64_t i = 0; i < rows; ++i) {
      to[i * kLeftStride + k] = values[i];
    }
  }
}

// The transpose of kTileColumns rows, kPiece apart, of `count` numbers; up to seven rows more than count are written.
void transpose(const float* from, int64_t count, float* to) {
#ifdef CPU_CAPABILITY_AVX2
  for (int64_t k = 0; k < count; k += kLanes) {
    for (int64_t j = 0; j < kTileColumns; j += kLanes) {
      at::vec::transpose_mxn<float, 8, 8>(from + j * kPiece + k, kPiece, to + k * kTileColumns + j, kTileColumns);
    }
  }
#else
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t j = 0; j < kTileColumns; ++j) {
      to[k * kTileColumns + j] = from[j * kPiece + k];
    }
  }
#endif
}

// A part of right in strips of kTileColumns columns, each (kDepth, kTileColumns), filled up with zeros.
template <typename T>
void widen_right(const Operand<T>& right, int64_t first, int64_t depth, int64_t column, int64_t columns, float* to) {
  constexpr int64_t kStrip = kDepth * kTileColumns;
  if (right.by_rows) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int64_t width = std::min(kTileColumns, columns - j);
        float* row = to + j * kDepth + k * kTileColumns;
        widen(right.at(first + k, column + j), row, width);
        std::fill(row + width, row + kTileColumns, 0.0f);
      }
    }
    return;
  }
  alignas(64) float piece[kTileColumns * kPiece] = {};
  for (int64_t j = 0; j < columns; j += kTileColumns, to += kStrip) {
    const int64_t width = std::min(kTileColumns, columns - j);
    std::fill(piece + width * kPiece, piece + kTileColumns * kPiece, 0.0f);
    for (int64_t k = 0; k < depth; k += kPiece) {
      const int64_t count = std::min(kPiece, depth - k);
      for (int64_t i = 0; i < width; ++i) {
        widen(right.at(first + k, column + j + i), piece + i * kPiece, count);
      }
      transpose(piece, count, to + k * kTileColumns);
    }
  }
}

// sums (kHeight, kTileColumns), `stride` apart, = [sums +] left right
template <int kHeight>
void multiply_tile(const float* left, const float* right, int64_t depth, float* sums, int64_t stride, bool add) {
  const Vec zero(0.0f);
  Vec low[kHeight], high[kHeight];
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
    low[i] = zero;
    high[i] = zero;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = right + k * kTileColumns;
    const Vec right_low = Vec::loadu(row), right_high = Vec::loadu(row + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) {
      const Vec value(left[i * kLeftStride + k]);
      low[i] = at::vec::fmadd(value, right_low, low[i]);
      high[i] = at::vec::fmadd(value, right_high, high[i]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
    float* to = sums + i * stride;
    const Vec before_low = add ? Vec::loadu(to) : zero, before_high = add ? Vec::loadu(to + kLanes) : zero;
    (before_low + low[i]).store(to);
    (before_high + high[i]).store(to + kLanes);
  }
}

using MultiplyTile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);
constexpr MultiplyTile kMultiplyTile[kTileRows] = {
    multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// sums (rows, stride) = [sums +] left right, for widened parts of both
void multiply_block(
    const float* left, const float* right, int64_t rows, int64_t depth, float* sums, int64_t stride, bool add) {
  for (int64_t j = 0; j < stride; j += kTileColumns, right += kDepth * kTileColumns) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t height = std::min(kTileRows, rows - i);
      kMultiplyTile[height - 1](left + i * kLeftStride, right, depth, sums + i * stride + j, stride, add);
    }
  }
}

// How many rows and columns a block of the result has.
struct Cut {
  Cut(int64_t rows, int64_t columns, int64_t depth) {
    worth_threads = rows * columns * depth >= kWorthThreads;
    const int64_t threads = worth_threads ? at::get_num_threads() : 1;
    row_count = at::divup(rows, kBlockRows);
    column_count = at::divup(columns, kBlockColumns);
    if (columns >= rows) {
      column_count = rounded_up(column_count, at::divup(threads, row_count));
    } else {
      row_count = rounded_up(row_count, at::divup(threads, column_count));
    }
    block_rows = rounded_up(at::divup(rows, row_count), kTileRows);
    block_columns = rounded_up(at::divup(columns, column_count), kTileColumns);
    row_count = at::divup(rows, block_rows);
    column_count = at::divup(columns, block_columns);
  }

  // The fp32 numbers of a thread's blocks: of left, of right, and of the sums.
  int64_t left_size() const { return block_rows * kLeftStride; }
  int64_t right_size() const { return block_columns * kDepth; }
  int64_t sum_size() const { return block_rows * block_columns; }

  bool worth_threads;
  int64_t block_rows, block_columns, row_count, column_count;
};

// out = [out +] scale · sums [+ bias], a row of a block
template <typename Out>
void finish_row(float* __restrict sums, int64_t count, float scale, const float* bias, bool add, float* old, Out* out) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] *= scale;
  }
  if (bias != nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      sums[j] += bias[j];
    }
  }
  if (add) {
    if constexpr (std::is_same_v<Out, float>) {
      old = out;
    } else {
      widen(out, old, count);
    }
    for (int64_t j = 0; j < count; ++j) {
      sums[j] += old[j];
    }
  }
  convert(sums, out, count);
}

template <typename T, typename Out>
void widened_product(
    const MatrixView& out,
    const MatrixView& left,
    const MatrixView& right,
    bool add,
    float scale,
    const OptionalTensor& bias) {
  const int64_t rows = left.rows, depth = left.columns, columns = right.columns;
  const Operand<T> a(left), b(right);
  const T* bias_data = bias ? bias->const_data_ptr<T>() : nullptr;
  Out* out_data = static_cast<Out*>(const_cast<void*>(out.data));
  const int64_t out_stride = out.row_stride;
  const Cut cut(rows, columns, depth);
  const Scratch<float> left_block(cut.left_size()), right_block(cut.right_size()), sum_block(cut.sum_size());

  const auto block = [&](int64_t row, int64_t row_count, int64_t column, int64_t column_count) {
    float* sums = sum_block.mine();
    const int64_t stride = rounded_up(column_count, kTileColumns);
    if (depth == 0) {
      std::fill(sums, sums + row_count * stride, 0.0f);
    }
    for (int64_t first = 0; first < depth; first += kDepth) {
      const int64_t count = std::min(kDepth, depth - first);
      widen_left(a, row, row_count, first, count, left_block.mine());
      widen_right(b, first, count, column, column_count, right_block.mine());
      multiply_block(left_block.mine(), right_block.mine(), row_count, count, sums, stride, first > 0);
    }
    float wide_bias[kBlockColumns], old[kBlockColumns];
    if (bias_data != nullptr) {
      widen(bias_data + column, wide_bias, column_count);
    }
    for (int64_t i = 0; i < row_count; ++i) {
      Out* to = out_data + (row + i) * out_stride + column;
      finish_row(sums + i * stride, column_count, scale, bias_data ? wide_bias : nullptr, add, old, to);
    }
  };
  const int64_t blocks = cut.row_count * cut.column_count;
  at::parallel_for(0, blocks, cut.worth_threads ? 1 : blocks, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % cut.row_count * cut.block_rows, column = index / cut.row_count * cut.block_columns;
      block(row, std::min(cut.block_rows, rows - row), column, std::min(cut.block_columns, columns - column));
    }
  });
}

bool has_a_direction(const MatrixView& matrix) {
  return matrix.column_stride == 1 || matrix.columns == 1 || matrix.row_stride == 1 || matrix.rows == 1;
}

// Whether the library has a loop for one row that reads a 16-bit matrix once.
bool is_one_row(const MatrixView& left, const MatrixView& right) {
  return left.rows == 1 && right.row_stride == 1;
}

// Through the dispatcher: the profiler counts the work of these, and tests hold it to the formulas.
void library_product(
    Tensor out, const Tensor& left, const Tensor& right, bool add, double scale, const OptionalTensor& bias) {
  if (out.scalar_type() != left.scalar_type()) {
    const Tensor product = at::mm(left, right);
    add ? out.add_(product, scale) : out.copy_(product).mul_(scale);
  } else if (bias) {
    at::addmm_out(out, *bias, left, right, 1, scale);
  } else if (add || scale != 1) {
    at::addmm_out(out, out, left, right, add ? 1 : 0, scale);
  } else {
    at::mm_out(out, left, right);
  }
}

} // namespace

bool widens(at::ScalarType dtype) {
#if defined(__x86_64__)
  static const bool widens_bf16 = !library_multiplies("mkldnn::_is_mkldnn_bf16_supported");
  static const bool widens_fp16 = !library_multiplies("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == at::kBFloat16 ? widens_bf16 : dtype == at::kHalf && widens_fp16;
#else
  return false;  // the library's answers for other processors are not known here
#endif
}

void product_out(
    const MatrixView& out,
    const MatrixView& left,
    const MatrixView& right,
    bool add,
    double scale,
    const OptionalTensor& bias) {
  const auto dtype = left.dtype;
  const bool sums_stay_wide = out.dtype != dtype;
  if (!widens(dtype) || (is_one_row(left, right) && !sums_stay_wide)) {
    return library_product(out.tensor(), left.tensor(), right.tensor(), add, scale, bias);
  }
  if (out.rows == 0 || out.columns == 0) {
    return;
  }
  if (!has_a_direction(left)) {
    return product_out(out, left.tensor().contiguous(), right, add, scale, bias);
  }
  if (!has_a_direction(right)) {
    return product_out(out, left, right.tensor().contiguous(), add, scale, bias);
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(dtype, "product", [&] {
    sums_stay_wide ? widened_product<scalar_t, float>(out, left, right, add, static_cast<float>(scale), bias)
                   : widened_product<scalar_t, scalar_t>(out, left, right, add, static_cast<float>(scale), bias);
  });
}

int64_t product_bytes(int64_t rows, int64_t depth, int64_t columns) {
  if (rows == 0 || columns == 0) {
    return 0;
  }
  const Cut cut(rows, columns, depth);
  int64_t bytes = 0;
  for (const int64_t size : {cut.left_size(), cut.right_size(), cut.sum_size()}) {
    bytes += Scratch<float>::bytes(size);
  }
  return bytes;
}

// The kernel of petl_kernels/ops/product.py.
void product(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
  product_out(out, left, right, add);
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(product);
  m.def("widens", TORCH_FN(petl::widens));
  m.def("product_bytes", TORCH_FN(petl::product_bytes));
}
