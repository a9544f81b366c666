#include "column_sum.h"

namespace petl {
namespace {

// A thread takes a strip of columns through all rows, so the order of the sums is fixed. Sums of kRun rows are
// formed first: the error of one long running sum grows with its length.
constexpr int64_t kStrip = 128, kRun = 32;

template <typename T>
void sum_strip(const T* matrix, int64_t rows, int64_t columns, int64_t width, compute_t<T>* totals) {
  compute_t<T> run[kStrip], values[kStrip];
  std::fill(totals, totals + width, compute_t<T>(0));
  for (int64_t first = 0; first < rows; first += kRun) {
    std::fill(run, run + width, compute_t<T>(0));
    for (int64_t row = first; row < std::min(rows, first + kRun); ++row) {
      convert(matrix + row * columns, values, width);
      for (int64_t j = 0; j < width; ++j) {
        run[j] += values[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      totals[j] += run[j];
    }
  }
}

} // namespace

Tensor column_sum(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  Tensor totals = empty({columns}, compute_type(matrix));
  PETL_DISPATCH_FLOATING(matrix.scalar_type(), "column_sum", [&] {
    const auto* values = matrix.const_data_ptr<scalar_t>();
    auto* sums = totals.mutable_data_ptr<compute_t<scalar_t>>();
    at::parallel_for(0, at::divup(columns, kStrip), 1, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * kStrip;
        sum_strip(values + first, rows, columns, std::min(kStrip, columns - first), sums + first);
      }
    });
  });
  return totals;
}

} // namespace petl
