// Registers CPU kernels: each file lists its own at its end, and petl_kernels/backends/cpu.py finds them by their names.
//
//   TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
//     PETL_KERNEL(frozen_linear);
//   }
//
// A kernel takes the arguments of the reference of that name in petl_kernels/ops and returns the same values.
#pragma once

#include <torch/library.h>

#include "common.h"

#define PETL_KERNEL(name) m.def(#name, torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::name)))
