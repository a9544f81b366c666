#pragma once

#include <torch/extension.h>

namespace petl {

// The properties of arguments for which Triton compiles a kernel anew: a byte or two for each of them and a pair of brackets for
// each tuple. Equal keys mean equal specialisations. None where an argument is of an unfamiliar kind.
pybind11::object launch_key(const pybind11::tuple& args);

} // namespace petl
