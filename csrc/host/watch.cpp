// The work of petl_kernels/layers/rule/watch.py at every call of a layer: some thousand comparisons of addresses.
#include "watch.h"

namespace py = pybind11;

namespace petl {

py::list values(const py::list& dictionaries) {
  py::list found;
  for (py::handle dictionary : dictionaries) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary.ptr(), &at, &key, &value);) {
      found.append(py::handle(value));
    }
  }
  return found;
}

bool same_values(const py::list& dictionaries, const py::list& before) {
  const Py_ssize_t expected = PyList_GET_SIZE(before.ptr());
  Py_ssize_t i = 0;
  for (py::handle dictionary : dictionaries) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary.ptr(), &at, &key, &value); ++i) {
      if (i >= expected || PyList_GET_ITEM(before.ptr(), i) != value) {
        return false;
      }
    }
  }
  return i == expected;
}

py::bytes stamps(const std::vector<at::Tensor>& tensors) {
  std::vector<uint64_t> found;
  found.reserve(2 * tensors.size());
  for (const at::Tensor& tensor : tensors) {
    found.push_back(tensor.is_inference() ? 0 : tensor._version());
    // The storage and not its address, which changes for a streamed weight whose values do not.
    found.push_back(reinterpret_cast<uint64_t>(tensor.storage().unsafeGetStorageImpl()));
  }
  return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(uint64_t));
}

} // namespace petl
