// The work of petl_kernels/backends/triton/launch.py at every launch: ten to fifty arguments, distinguished as Triton's
// own native_specialize_impl does.
#include "launch_key.h"

#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <string>

namespace py = pybind11;

namespace petl {
namespace {

constexpr int deepest = 8;

bool add_number(PyObject* number, std::string& key) {
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow != 0) {
    return false;
  }
  const bool narrow = value >= INT32_MIN && value <= INT32_MAX;
  const bool divisible = (value & 15) == 0;
  key += value == 1 ? '1' : narrow ? (divisible ? 'I' : 'i') : (divisible ? 'L' : 'l');
  return true;
}

void add_tensor(const at::Tensor& tensor, std::string& key) {
  key += (reinterpret_cast<uintptr_t>(tensor.data_ptr()) & 15) == 0 ? 'P' : 'p';
  key += static_cast<char>(tensor.scalar_type());
}

bool add_tuple(PyObject* arguments, std::string& key, int depth) {
  if (depth > deepest) {
    return false;
  }
  key += '(';
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
    PyObject* one = PyTuple_GET_ITEM(arguments, i);
    if (THPVariable_CheckExact(one)) {
      add_tensor(THPVariable_Unpack(one), key);
    } else if (PyLong_CheckExact(one)) {
      if (!add_number(one, key)) {
        return false;
      }
    } else if (PyTuple_CheckExact(one)) {
      if (!add_tuple(one, key, depth + 1)) {
        return false;
      }
    } else if (one == Py_None) {
      key += 'n';
    } else if (PyFloat_CheckExact(one)) {
      key += 'f';
    } else if (PyBool_Check(one)) {
      key += 'b';
    } else {
      return false;
    }
  }
  key += ')';
  return true;
}

} // namespace

py::object launch_key(const py::tuple& args) {
  std::string key;
  key.reserve(128);
  if (!add_tuple(args.ptr(), key, 0)) {
    return py::none();
  }
  return py::bytes(key);
}

} // namespace petl
