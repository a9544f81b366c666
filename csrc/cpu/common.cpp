#include "common.h"

namespace petl {
namespace {

// to = from, both contiguous; false where convert() has no way from one dtype to the other.
template <typename To>
bool convert_values(const Tensor& from, To* to) {
  const auto dtype = from.scalar_type();
  const int64_t count = from.numel();
  if (dtype == c10::CppTypeToScalarType<To>::value) {
    std::copy_n(from.const_data_ptr<To>(), count, to);
    return true;
  }
  if constexpr (at::vec::is_reduced_floating_point_v<To>) {
    if (dtype == at::kFloat) {
      convert(from.const_data_ptr<float>(), to, count);
      return true;
    }
  }
  if constexpr (std::is_same_v<To, float>) {
    if (dtype == at::kBFloat16) {
      convert(from.const_data_ptr<at::BFloat16>(), to, count);
      return true;
    }
    if (dtype == at::kHalf) {
      convert(from.const_data_ptr<at::Half>(), to, count);
      return true;
    }
  }
  return false;
}

} // namespace

Tensor in_dtype(const Tensor& x, at::ScalarType dtype, bool copy) {
  const Tensor values = x.contiguous();
  if (!copy && x.scalar_type() == dtype) {
    return values;
  }
  Tensor converted = empty(x.sizes(), dtype);
  bool done = false;
  PETL_DISPATCH_FLOATING(dtype, "in_dtype", [&] {
    done = convert_values(values, converted.mutable_data_ptr<scalar_t>());
  });
  return done ? converted : converted.copy_(values);
}

} // namespace petl
