#pragma once

#include <pybind11/pybind11.h>

namespace petl {

// What petl_kernels/weights/mapped.py and slots.py call: MappedFile, place, take_away; in CUDA builds SlotRing and
// pinned.
void bind_streaming(pybind11::module_& m);

} // namespace petl
