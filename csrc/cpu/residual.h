// Shared by dropout_add and dropout_add_norm: dropped values, their sum with the residual stream, and the dtypes of both.
#pragma once

#include "elementwise.h"
#include "rows.h"

namespace petl {

// y = residual + drop(x) for count elements, the first of which is element first.
template <typename x_t, typename y_t>
void add_dropped(const Dropout& mask, const x_t* x, const y_t* residual, y_t* y, int64_t count, int64_t first) {
  using acc_t = compute_t<y_t>;
  acc_t values[kChunk], buffer[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t n = std::min(kChunk, count - start);
    convert(x + start, values, n);
    drop(mask, values, n, first + start);
    accumulate(converted(residual + start, buffer, n), values, n);
    convert(values, y + start, n);
  }
}

// dx = drop(dy) for count elements, the first of which is element first.
template <typename x_t, typename y_t>
void write_dropped(const Dropout& mask, const y_t* dy, x_t* dx, int64_t count, int64_t first) {
  compute_t<y_t> grads[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t n = std::min(kChunk, count - start);
    convert(dy + start, grads, n);
    drop(mask, grads, n, first + start);
    convert(grads, dx + start, n);
  }
}

// f(narrow(), wide()) for the dtypes of x and of the residual stream: one dtype, or a 16-bit x beside an fp32 stream.
template <typename F>
void dispatch_stream(at::ScalarType x, at::ScalarType stream, const F& f) {
  if (x == at::kBFloat16 && stream == at::kFloat) {
    return f(at::BFloat16(), float());
  }
  if (x == at::kHalf && stream == at::kFloat) {
    return f(at::Half(), float());
  }
  PETL_DISPATCH_FLOATING(stream, "dropout_add", [&] { f(scalar_t(), scalar_t()); });
}

// The dtype in which x is read or written: its own beside the stream's where dispatch_stream() has the pair.
inline at::ScalarType served(at::ScalarType x, at::ScalarType stream) {
  return stream == at::kFloat && (x == at::kBFloat16 || x == at::kHalf) ? x : stream;
}

} // namespace petl
