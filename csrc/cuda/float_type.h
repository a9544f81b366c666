// The dtypes of a matrix, for kernels that know no PyTorch.
#pragma once

namespace petl {

enum class FloatType { fp32, fp64, fp16, bf16 };

} // namespace petl
