// Compiled in CUDA builds only: setup.py gives PETL_CUDA, and so does the compile test.
#if defined(PETL_CUDA)

#include "slot_ring.h"

namespace petl {
namespace {

class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~OnDevice() {
    cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
};

} // namespace

SlotRing::SlotRing(std::vector<char*> slots, int device) {
  for (char* memory : slots) {
    slots_.push_back({memory, nullptr, nullptr});
  }
  status_ = prepare(device);
}

cudaError_t SlotRing::prepare(int device) {
  const OnDevice guard(device);
  if (cudaError_t error = cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking)) {
    return error;
  }
  for (Slot& slot : slots_) {
    for (cudaEvent_t* event : {&slot.ready, &slot.used}) {
      if (cudaError_t error = cudaEventCreateWithFlags(event, cudaEventDisableTiming)) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

SlotRing::~SlotRing() {
  if (copies_ != nullptr) {
    cudaStreamSynchronize(copies_); // the caller may free both ends of a copy next
    cudaStreamDestroy(copies_);
  }
  for (const Slot& slot : slots_) {
    for (cudaEvent_t event : {slot.ready, slot.used}) {
      if (event != nullptr) {
        cudaEventDestroy(event);
      }
    }
  }
}

cudaError_t SlotRing::fill(size_t slot, const std::vector<Piece>& pieces) {
  const Slot& to = slots_.at(slot);
  // an event that was never recorded counts as done
  if (cudaError_t error = cudaStreamWaitEvent(copies_, to.used, 0)) {
    return error;
  }
  for (const Piece& piece : pieces) {
    if (cudaError_t error =
            cudaMemcpyAsync(to.memory + piece.offset, piece.host, piece.bytes, cudaMemcpyHostToDevice, copies_)) {
      return error;
    }
  }
  return cudaEventRecord(to.ready, copies_);
}

cudaError_t SlotRing::acquire(size_t slot, cudaStream_t compute) {
  return cudaStreamWaitEvent(compute, slots_.at(slot).ready, 0);
}

cudaError_t SlotRing::release(size_t slot, cudaStream_t compute) {
  return cudaEventRecord(slots_.at(slot).used, compute);
}

} // namespace petl

#endif
