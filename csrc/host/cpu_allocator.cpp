#include "cpu_allocator.h"

#include <atomic>

#if defined(__linux__)
#include <malloc.h>
#endif

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace petl {
namespace {

std::atomic<int64_t> allocated{0}, peak{0}, limit{0};

// The size as the C library rounds it, which it also reports for memory that is freed.
int64_t size_of(void* data) {
#if defined(__linux__)
  return static_cast<int64_t>(malloc_usable_size(data));
#else
  (void)data;
  return 0;
#endif
}

void raise_peak(int64_t now) {
  int64_t before = peak.load(std::memory_order_relaxed);
  while (now > before && !peak.compare_exchange_weak(before, now, std::memory_order_relaxed)) {
  }
}

void free_counted(void* data) {
  if (data != nullptr) {
    allocated.fetch_sub(size_of(data), std::memory_order_relaxed);
  }
  c10::GetDefaultCPUAllocator()->raw_deleter()(data);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const int64_t allowed = limit.load(std::memory_order_relaxed);
    const int64_t now = allocated.load(std::memory_order_relaxed);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        allowed == 0 || now + static_cast<int64_t>(bytes) <= allowed,
        "CPU tensors: ", bytes, " bytes beside ", now, " would be more than the limit of ", allowed);
    c10::DataPtr inner = c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* data = inner.release_context();
    if (data != nullptr) {
      const int64_t size = size_of(data);
      raise_peak(allocated.fetch_add(size, std::memory_order_relaxed) + size);
    }
    return {data, data, &free_counted, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_counted; }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

} // namespace

void install_cpu_allocator() {
  static CountingAllocator counting;
  // A priority above that of PyTorch's own, whatever was set before.
  c10::SetCPUAllocator(&counting, /*priority=*/255);
}

int64_t cpu_bytes() {
  return allocated.load(std::memory_order_relaxed);
}

int64_t cpu_peak() {
  return peak.load(std::memory_order_relaxed);
}

void reset_cpu_peak() {
  peak.store(allocated.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

void limit_cpu_bytes(int64_t bytes) {
  limit.store(bytes, std::memory_order_relaxed);
}

} // namespace petl
