#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

namespace petl {
namespace {

int64_t page_size() {
  static const int64_t size = sysconf(_SC_PAGESIZE);
  return size;
}

int64_t round_up(int64_t value) {
  return (value + page_size() - 1) / page_size() * page_size();
}

int64_t round_down(int64_t value) {
  return value / page_size() * page_size();
}

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) {
      close(number);
    }
  }
};

} // namespace

struct MappedFile::Mapping {
  char* start = nullptr;
  int64_t size = 0;
  std::string path;

  ~Mapping() {
    if (start != nullptr) {
      munmap(start, size);
    }
  }
};

MappedFile::MappedFile(const std::string& path) : mapping_(std::make_shared<Mapping>()) {
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat status;
  if (file.number < 0 || fstat(file.number, &status) != 0) {
    fail(path);
  }
  mapping_->path = path;
  mapping_->size = status.st_size;
  if (status.st_size == 0) {
    return;
  }
  // NORESERVE: pages that are only read need no swap space, and the file may be larger than memory.
  void* start =
      mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.number, 0);
  if (start == MAP_FAILED) {
    fail(path);
  }
  mapping_->start = static_cast<char*>(start);
}

int64_t MappedFile::size() const {
  return mapping_->size;
}

at::Tensor MappedFile::tensor(int64_t offset, int64_t bytes) const {
  check(offset, bytes);
  return at::from_blob(mapping_->start + offset, {bytes}, [keep = mapping_](void*) {}, at::kByte);
}

void MappedFile::will_need(int64_t offset, int64_t bytes) const {
  check(offset, bytes);
  const int64_t first = round_down(offset);
  if (bytes > 0 && madvise(mapping_->start + first, offset + bytes - first, MADV_WILLNEED) != 0) {
    fail(mapping_->path);
  }
}

void MappedFile::drop(int64_t offset, int64_t bytes) const {
  check(offset, bytes);
  const int64_t first = round_up(offset);
  // the file's last page may be short, and nothing else is in it
  const int64_t last = offset + bytes == size() ? round_up(size()) : round_down(offset + bytes);
  if (first < last && madvise(mapping_->start + first, last - first, MADV_DONTNEED) != 0) {
    fail(mapping_->path);
  }
}

int64_t MappedFile::resident(int64_t offset, int64_t bytes) const {
  check(offset, bytes);
  if (bytes == 0) {
    return 0;
  }
  const int64_t first = round_down(offset), pages = (round_up(offset + bytes) - first) / page_size();
  const Descriptor table{open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
  std::vector<uint64_t> entries(pages); // one a page; the table is read in whole entries only
  const int64_t wanted = pages * sizeof(uint64_t);
  const int64_t at = (reinterpret_cast<intptr_t>(mapping_->start) + first) / page_size() * sizeof(uint64_t);
  if (table.number < 0 || pread(table.number, entries.data(), wanted, at) != wanted) {
    fail("/proc/self/pagemap");
  }
  constexpr uint64_t present = uint64_t{1} << 63;
  return page_size() * std::count_if(entries.begin(), entries.end(), [](uint64_t entry) { return entry & present; });
}

void MappedFile::check(int64_t offset, int64_t bytes) const {
  TORCH_CHECK_INDEX(
      offset >= 0 && bytes >= 0 && offset <= size() && bytes <= size() - offset,
      mapping_->path,
      ": bytes ",
      offset,
      " to ",
      offset + bytes,
      " asked for, it has ",
      size());
}

} // namespace petl
