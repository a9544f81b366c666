#pragma once

#include <pybind11/pybind11.h>

namespace petl {

// The values of dictionaries, one after the other.
pybind11::list values(const pybind11::list& dictionaries);

// Whether they are the very objects in `before`, which `values` has returned.
bool same_values(const pybind11::list& dictionaries, const pybind11::list& before);

} // namespace petl
