// Column sums of matrices: bias gradients.
#pragma once

#include "common.h"

namespace petl {

// Σ over the rows of a contiguous matrix (rows, columns), in its compute dtype; shape (columns,).
Tensor column_sum(const Tensor& matrix);

} // namespace petl
