#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>

namespace petl {

// A file in memory, page by page as it is read. The mapping is private and can be written to: a write changes this
// process' copy of the page, never the file, and drop() loses it. Errors of the system are std::system_error.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);

  int64_t size() const;

  // `bytes` bytes from `offset`, uint8, not copied. Each tensor has a storage of its own, since others tell tied
  // tensors by their storage, and keeps the mapping alive.
  at::Tensor tensor(int64_t offset, int64_t bytes) const;

  // Read ahead: the system starts reading these bytes and returns.
  void will_need(int64_t offset, int64_t bytes) const;

  // Give back the pages that lie wholly within these bytes; the next read takes them from the file again.
  void drop(int64_t offset, int64_t bytes) const;

  // Bytes of the pages of this range that are in this process' memory now (Linux: /proc/self/pagemap).
  int64_t resident(int64_t offset, int64_t bytes) const;

 private:
  struct Mapping;
  void check(int64_t offset, int64_t bytes) const;

  std::shared_ptr<Mapping> mapping_;
};

} // namespace petl
