// Copies from pinned host memory into a few slots of device memory, ahead of their use. CUDA's runtime API and nothing
// of PyTorch: any machine with the CUDA headers compiles it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

namespace petl {

// The order for a slot is fill, acquire, (kernels that read it), release, and fill again. No call waits on the host.
//
//   copy stream      waits for `used`    copies    records `ready`
//   compute stream                                 waits for `ready`    kernels    records `used`
class SlotRing {
 public:
  struct Piece {
    const void* host; // pinned, and unchanged until the copy has ended
    size_t offset; // in the slot
    size_t bytes;
  };

  // slots: addresses on `device`, owned by the caller, who keeps them until this is gone.
  SlotRing(std::vector<char*> slots, int device);
  ~SlotRing();
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  // The error in making the stream and the events, after which the object cannot be used.
  cudaError_t status() const {
    return status_;
  }

  // Copies the pieces into the slot, after what its last release covers.
  cudaError_t fill(size_t slot, const std::vector<Piece>& pieces);

  // Work that is put on `compute` from now on runs after the slot's last fill.
  cudaError_t acquire(size_t slot, cudaStream_t compute);

  // Work that is on `compute` by now was the last to read the slot.
  cudaError_t release(size_t slot, cudaStream_t compute);

 private:
  struct Slot {
    char* memory;
    cudaEvent_t ready;
    cudaEvent_t used;
  };

  cudaError_t prepare(int device);

  std::vector<Slot> slots_;
  cudaStream_t copies_ = nullptr;
  cudaError_t status_ = cudaSuccess;
};

} // namespace petl
