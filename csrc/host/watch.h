#pragma once

#include <torch/extension.h>

#include <vector>

namespace petl {

// The values of dictionaries, one after the other.
pybind11::list values(const pybind11::list& dictionaries);

// Whether they are the very objects in `before`, which `values` has returned.
bool same_values(const pybind11::list& dictionaries, const pybind11::list& before);

// The properties of each tensor that change with its values: its version, and (by assigning `data`) its storage.
pybind11::bytes stamps(const std::vector<at::Tensor>& tensors);

} // namespace petl
