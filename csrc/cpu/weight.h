// A frozen weight in any storage, and the products with it. What its parts are: petl_kernels/ops/quantized.
#pragma once

#include "common.h"

namespace petl {

enum class Storage { dense, int8, nf4 };

// The storage of a weight, which the dtype of its first part names.
Storage storage_of(const Tensor& first_part);

// A matrix (out, in) in any storage.
struct Weight {
  at::TensorList parts;
  int64_t out, in;

  bool dense() const { return storage_of(parts[0]) == Storage::dense; }
};

// The weight of these parts, when one of its sizes is known.
Weight weight_with_in(at::TensorList parts, int64_t in);
Weight weight_with_out(at::TensorList parts, int64_t out);

// Several weights (·, in), whose parts stand one after the other.
std::vector<Weight> weights_with_in(at::TensorList flat, int64_t in);

// x (rows, in) Ŵᵀ [+ bias (out,)], and dy (rows, out) Ŵ, in the dtype of x and dy, which a dense weight has too. A
// quantized one exists in tiles of at most 1 MiB. out may be a view into a larger matrix.
Tensor project(const Tensor& x, const Weight& weight, const OptionalTensor& bias);
void project_out(Tensor out, const Tensor& x, const Weight& weight, const OptionalTensor& bias = std::nullopt);
Tensor project_back(const Tensor& dy, const Weight& weight);
void project_back_out(Tensor out, const Tensor& dy, const Weight& weight, bool add = false);

} // namespace petl
