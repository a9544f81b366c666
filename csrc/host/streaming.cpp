#include "streaming.h"

#include <pybind11/stl.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <system_error>
#include <tuple>

#include "mapped_file.h"
#if defined(PETL_CUDA)
#include "slot_ring.h"
#endif

namespace py = pybind11;

namespace petl {
namespace {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
// PyTorch before 2.13 has no way back from release_data_and_set_meta_custom_data_ptr_error_msg_: what it sets is private,
// and only an explicit instantiation may name it.
bool& refuses_reads(c10::StorageImpl& storage);

template <bool c10::StorageImpl::*kMember>
struct Opened {
  friend bool& refuses_reads(c10::StorageImpl& storage) {
    return storage.*kMember;
  }
};
template struct Opened<&c10::StorageImpl::throw_on_immutable_data_ptr_>;

void allow_reads(c10::StorageImpl* storage) {
  refuses_reads(*storage) = false; // set_data_ptr_noswap, which follows, brings the flags made of it up to date
}
#else
void allow_reads(c10::StorageImpl* storage) {
  storage->clear_data_ptr_access_error_msg_();
}
#endif

// The tensor's values are at `address` from now on, for every view of it too: the storage stays the same object.
void place(const at::Tensor& tensor, uintptr_t address) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  allow_reads(storage);
  storage->set_data_ptr_noswap({reinterpret_cast<void*>(address), tensor.device()});
}

// The tensor has no values until place(); who reads them is told `why`.
void take_away(const at::Tensor& tensor, const std::string& why) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  allow_reads(storage);
  storage->set_data_ptr_noswap({nullptr, tensor.device()});
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(why);
}

#if defined(PETL_CUDA)

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError(); // or the next check of a kernel would report it
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

// Exactly so many bytes: PyTorch's own allocator of pinned memory rounds up to a power of two.
at::Tensor pinned(int64_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault));
  return at::from_blob(memory, {bytes}, [](void* memory) { cudaFreeHost(memory); }, at::kByte);
}

std::unique_ptr<SlotRing> slot_ring(const std::vector<uintptr_t>& slots, int device) {
  std::vector<char*> addresses;
  for (uintptr_t slot : slots) {
    addresses.push_back(reinterpret_cast<char*>(slot));
  }
  auto ring = std::make_unique<SlotRing>(addresses, device);
  check(ring->status());
  return ring;
}

void fill(SlotRing& ring, size_t slot, const std::vector<std::tuple<uintptr_t, size_t, size_t>>& pieces) {
  std::vector<SlotRing::Piece> list;
  for (const auto& [host, offset, bytes] : pieces) {
    list.push_back({reinterpret_cast<const void*>(host), offset, bytes});
  }
  check(ring.fill(slot, list));
}

#endif

} // namespace

void bind_streaming(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      const auto value = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, value.ptr());
    }
  });
  py::class_<MappedFile>(m, "MappedFile", "A file in memory, page by page as it is read.")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def("size", &MappedFile::size)
      .def("tensor", &MappedFile::tensor, py::arg("offset"), py::arg("bytes"))
      .def("will_need", &MappedFile::will_need, py::arg("offset"), py::arg("bytes"))
      .def("drop", &MappedFile::drop, py::arg("offset"), py::arg("bytes"))
      .def("resident", &MappedFile::resident, py::arg("offset"), py::arg("bytes"));
  m.def("place", &place, "Put a tensor's storage at an address.");
  m.def("take_away", &take_away, "Leave a tensor without values, and say why to whoever reads them.");
#if defined(PETL_CUDA)
  m.def("pinned", &pinned, "Pinned host memory of exactly so many bytes.");
  py::class_<SlotRing>(m, "SlotRing", "Copies from pinned memory into slots of device memory, ahead of their use.")
      .def(py::init(&slot_ring), py::arg("slots"), py::arg("device"))
      .def("fill", &fill, py::arg("slot"), py::arg("pieces"))
      .def(
          "acquire",
          [](SlotRing& ring, size_t slot, uintptr_t stream) {
            check(ring.acquire(slot, reinterpret_cast<cudaStream_t>(stream)));
          },
          py::arg("slot"),
          py::arg("stream"))
      .def(
          "release",
          [](SlotRing& ring, size_t slot, uintptr_t stream) {
            check(ring.release(slot, reinterpret_cast<cudaStream_t>(stream)));
          },
          py::arg("slot"),
          py::arg("stream"));
#endif
}

} // namespace petl
