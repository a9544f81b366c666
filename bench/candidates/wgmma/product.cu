// The host's side of the product: tensor maps, the choice of the kernel, its launch. One C function, no PyTorch.
#include "product.h"

// 16-bit, row-major, `stride` elements from row to row. __init__.py has the same structure.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
};

namespace {

using namespace wgmma;

using Kernel = void (*)(Operands);

template <typename Element, int kWidth>
Kernel kernel_of(bool by_rows) {
  return by_rows ? product<Element, kWidth, true> : product<Element, kWidth, false>;
}

template <typename Element>
Kernel kernel_of(int width, bool by_rows) {
  return width == 256 ? kernel_of<Element, 256>(by_rows) : kernel_of<Element, 128>(by_rows);
}

// A map whose boxes are `box_rows` rows of 128 bytes: the most that the swizzle takes.
const char* encode(hopper::TensorMap& map, const Matrix& matrix, bool bf16, int box_rows) {
  return hopper::encode_map(
      map, matrix.data, matrix.rows, matrix.columns, 2 * matrix.stride, bf16, box_rows, kColumnsOfBox);
}

} // namespace

// left_g (rows, K_g) times right_g, which is (columns, K_g), or (K_g, columns) if by_rows; likewise the rank part.
// width: columns of an output tile, 128 or 256. Returns null, or what is wrong.
extern "C" const char* petl_wgmma_product(
    const Matrix* out, const Matrix* left, const Matrix* right, int terms, const Matrix* rank_left,
    const Matrix* rank_right, float scale, const void* bias, bool by_rows, bool bf16, int width, int blocks,
    void* stream) {
  if (terms < 1 || terms > kMaxTerms || (width != 128 && width != 256) || (by_rows && bias)) {
    return "one to three terms, tiles of 128 or 256 columns, a bias only where right is not by rows";
  }
  Operands given{};
  const int right_rows = by_rows ? kDepth : width;
  const char* error = encode(given.out, *out, bf16, kOwnRows);
  error = error ? error : encode(given.rank_left, *rank_left, bf16, kRows);
  error = error ? error : encode(given.rank_right, *rank_right, bf16, right_rows);
  for (int term = 0; term < terms && !error; ++term) {
    error = encode(given.left[term], left[term], bf16, kRows);
    error = error ? error : encode(given.right[term], right[term], bf16, right_rows);
    given.steps[term] = static_cast<int>((left[term].columns + kDepth - 1) / kDepth);
  }
  if (error) {
    return error;
  }
  given.terms = terms;
  given.rank = static_cast<int>(rank_left->columns);
  given.rows = static_cast<int>(out->rows);
  given.columns = static_cast<int>(out->columns);
  given.bias = static_cast<const uint16_t*>(bias);
  given.scale = scale;
  const Kernel kernel =
      bf16 ? kernel_of<hopper::Bfloat16>(width, by_rows) : kernel_of<hopper::Half>(width, by_rows);
  const int shared_bytes = width == 256 ? Shared<256>::kBytes : Shared<128>::kBytes;
  return hopper::launch(kernel, blocks, kThreads, shared_bytes, stream, given);
}
