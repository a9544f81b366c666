// The formulas are in petl_kernels/ops/gated_activation.py.
#include "activations.h"
#include "elementwise.h"
#include "kernel.h"

namespace petl {
namespace {

// values ⊙= factors
template <typename T>
void multiply(const T* __restrict factors, T* __restrict values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    values[j] *= factors[j];
  }
}

} // namespace

Tensor gated_activation(
    const Tensor& z, const Tensor& g, std::string_view kind, double dropout, const OptionalTensor& seed) {
  const Tensor z_rows = as_rows(z), g_rows = as_rows(g);
  const Dropout mask(dropout, seed, z.size(-1));
  const Activation act = parse_activation(kind);
  Tensor y = at::empty_like(z_rows);
  PETL_DISPATCH_FLOATING(z.scalar_type(), "gated_activation", [&] {
    const auto* z_data = z_rows.const_data_ptr<scalar_t>();
    const auto* g_data = g_rows.const_data_ptr<scalar_t>();
    auto* y_data = y.mutable_data_ptr<scalar_t>();
    parallel_chunks(y.numel(), [&](int64_t first, int64_t count) {
      compute_t<scalar_t> values[kChunk], buffer[kChunk];
      convert(z_data + first, values, count);
      activate(act, values, count);
      multiply(converted(g_data + first, buffer, count), values, count);
      drop(mask, values, count, first);
      convert(values, y_data + first, count);
    });
  });
  return y.view(z.sizes());
}

std::tuple<Tensor, Tensor> gated_activation_backward(
    const Tensor& dy,
    const Tensor& z,
    const Tensor& g,
    std::string_view kind,
    double dropout,
    const OptionalTensor& seed) {
  const Tensor rows = as_rows(dy), z_rows = as_rows(z), g_rows = as_rows(g);
  const Dropout mask(dropout, seed, z.size(-1));
  const Activation act = parse_activation(kind);
  Tensor dz = at::empty_like(rows), dg = at::empty_like(rows);
  PETL_DISPATCH_FLOATING(dy.scalar_type(), "gated_activation_backward", [&] {
    const auto* dy_data = rows.const_data_ptr<scalar_t>();
    const auto* z_data = z_rows.const_data_ptr<scalar_t>();
    const auto* g_data = g_rows.const_data_ptr<scalar_t>();
    auto* dz_data = dz.mutable_data_ptr<scalar_t>();
    auto* dg_data = dg.mutable_data_ptr<scalar_t>();
    parallel_chunks(dz.numel(), [&](int64_t first, int64_t count) {
      compute_t<scalar_t> values[kChunk] = {}, grads[kChunk], products[kChunk];
      convert(z_data + first, values, count);
      convert(dy_data + first, grads, count);
      drop(mask, grads, count, first);

      convert(g_data + first, products, count);
      multiply(grads, products, count);
      activate_backward(act, values, products, count);
      convert(products, dz_data + first, count);

      activate(act, values, count);
      multiply(grads, values, count);
      convert(values, dg_data + first, count);
    });
  });
  return {dz.view(z.sizes()), dg.view(z.sizes())};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(gated_activation);
  PETL_KERNEL(gated_activation_backward);
}
