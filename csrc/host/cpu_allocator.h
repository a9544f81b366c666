#pragma once

#include <cstdint>

namespace petl {

// Counts what PyTorch allocates on the CPU, in every thread and inside every kernel, and refuses to go over a limit.
//
// `install` puts a counting allocator in the place of PyTorch's for the rest of the process. Memory from before it is
// not counted, and freed as ever.
void install_cpu_allocator();

// Bytes allocated since `install` and not freed.
int64_t cpu_bytes();

// The most since `install` or the last reset.
int64_t cpu_peak();
void reset_cpu_peak();

// Allocations that would take cpu_bytes() over `bytes` raise torch.OutOfMemoryError; 0 for no limit.
void limit_cpu_bytes(int64_t bytes);

} // namespace petl
