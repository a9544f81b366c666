// What the CPU kernels share: blocks of rows that stay in cache, and wide arithmetic for narrow dtypes.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#define PETL_DISPATCH_FLOATING(dtype, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, name, __VA_ARGS__)

namespace petl {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The dtype of sums and of arithmetic between products: fp64 for fp64, fp32 for everything else.
template <typename T>
using compute_t = at::opmath_type<T>;

inline at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The helpers up to in_dtype() do what PyTorch's operations of like names do, without the dispatcher: at a few tokens
// the way through it is most of a kernel's time.

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return Tensor(at::detail::empty_cpu(sizes, dtype));
}

inline Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor values = empty(sizes, dtype);
  if (values.numel() > 0) {
    std::memset(values.mutable_data_ptr(), 0, values.nbytes());
  }
  return values;
}

// What stands for "not asked for" in results.
inline Tensor absent(at::ScalarType dtype) {
  return empty({0}, dtype);
}

// The memory of a contiguous x under other sizes with as many elements.
inline Tensor with_sizes(const Tensor& x, at::IntArrayRef sizes) {
  if (x.sizes() == sizes) {
    return x;
  }
  const auto* impl = x.unsafeGetTensorImpl();
  auto other = impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true);
  other->set_sizes_contiguous(sizes);
  return Tensor(std::move(other));
}

// x (..., features) as a contiguous matrix (rows, features).
inline Tensor as_rows(const Tensor& x) {
  const int64_t features = x.size(-1);
  if (x.is_contiguous() && features > 0) {
    return with_sizes(x, {x.numel() / features, features});
  }
  return x.reshape({-1, features}).contiguous();
}

// The values of x, contiguous, in dtype: x itself where it is so. in_dtype(x, dtype, copy=true) is always a copy.
Tensor in_dtype(const Tensor& x, at::ScalarType dtype, bool copy = false);

// The shape of x with another number of features.
inline std::vector<int64_t> with_features(const Tensor& x, int64_t features) {
  auto sizes = x.sizes().vec();
  sizes.back() = features;
  return sizes;
}

// A matrix over memory that somebody else owns: blocks of a larger matrix, scratch. PyTorch's operations take it.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, at::dtype(c10::CppTypeToScalarType<T>::value));
}

// A matrix is worked on in blocks of rows: at most kMaxRows, enough for the library's products to run well and few
// enough for the cache (or fewer, where there is no product). The cut depends on the number of rows alone, never on the
// number of threads.
struct Blocks {
  static constexpr int64_t kMaxRows = 256;

  explicit Blocks(int64_t rows, int64_t max_rows = kMaxRows)
      : rows(rows),
        count(std::max<int64_t>(1, at::divup(rows, max_rows))),
        block_rows(std::max<int64_t>(1, at::divup(rows, count))) {}

  // f(first_row, row_count) for the blocks [begin, end)
  template <typename F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin * block_rows; row < std::min(rows, end * block_rows); row += block_rows) {
      f(row, std::min(block_rows, rows - row));
    }
  }

  template <typename F>
  void parallel_for_each(const F& f) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      // Worker threads do not inherit the caller's dispatch state (autograd off, inference mode).
      at::AutoDispatchBelowADInplaceOrView guard;
      for_each(begin, end, f);
    });
  }

  int64_t rows, count, block_rows;
};

// For sums over rows: the blocks are grouped into at most kMaxSlices slices, and a slice owns one partial sum. Partial
// sums are added in order, so the result does not depend on how the work was spread over threads.
class Slices {
 public:
  static constexpr int64_t kMaxSlices = 16;

  explicit Slices(const Blocks& blocks)
      : blocks_(blocks),
        slice_blocks_(at::divup(blocks.count, kMaxSlices)),
        count_(at::divup(blocks.count, slice_blocks_)) {}

  // Zeros of shape (slices, *shape) in the compute dtype of like.
  Tensor partial_sums(const Tensor& like, std::vector<int64_t> shape) const {
    shape.insert(shape.begin(), count_);
    return zeros(shape, compute_type(like));
  }

  // The partial sums added in order.
  static Tensor total(const Tensor& partial_sums) {
    const int64_t slices = partial_sums.size(0), count = partial_sums.numel() / std::max<int64_t>(1, slices);
    if (slices == 1) {
      return with_sizes(partial_sums, partial_sums.sizes().slice(1));
    }
    const Tensor total = empty(partial_sums.sizes().slice(1), partial_sums.scalar_type());
    AT_DISPATCH_FLOATING_TYPES(partial_sums.scalar_type(), "total", [&] {
      const auto* from = partial_sums.const_data_ptr<scalar_t>();
      auto* __restrict to = total.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
        std::copy(from + begin, from + end, to + begin);
        for (int64_t slice = 1; slice < slices; ++slice) {
          const scalar_t* part = from + slice * count;
          for (int64_t j = begin; j < end; ++j) {
            to[j] += part[j];
          }
        }
      });
    });
    return total;
  }

  // f(slice, first_row, row_count) for each block, slices in parallel.
  template <typename F>
  void parallel_for_each(const F& f) const {
    at::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t slice = begin; slice < end; ++slice) {
        blocks_.for_each(slice * slice_blocks_, (slice + 1) * slice_blocks_, [&](int64_t row, int64_t count) {
          f(slice, row, count);
        });
      }
    });
  }

 private:
  Blocks blocks_;
  int64_t slice_blocks_, count_;
};

// The partial sum of one slice.
template <typename T>
T* slice_of(const Tensor& partial_sums, int64_t slice) {
  return partial_sums.mutable_data_ptr<T>() + slice * partial_sums.stride(0);
}

// Memory for as long as the object lives: inside it where a few KB suffice, else from the allocator of tensors, which
// is counted.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > sizeof(own_)) {
      allocated_ = c10::GetCPUAllocator()->allocate(bytes);
    }
    values_ = static_cast<T*>(bytes > sizeof(own_) ? allocated_.get() : own_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  T* data() const { return values_; }

 private:
  alignas(64) std::byte own_[4096];
  at::DataPtr allocated_;
  T* values_;
};

// Scratch memory, one piece a thread. Allocated once by the caller: pages that are new cost more than the arithmetic.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : size_(aligned(size)), memory_(at::get_num_threads() * size_) {}

  // The bytes of such memory for pieces of so many elements.
  static int64_t bytes(int64_t size) { return at::get_num_threads() * aligned(size) * sizeof(T); }

  T* mine() const { return memory_.data() + at::get_thread_num() * size_; }

 private:
  static int64_t aligned(int64_t size) { return at::divup(size, 64) * 64; }

  int64_t size_;
  Memory<T> memory_;
};

template <typename To, typename From>
void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::copy(from, from + count, to);
  } else if constexpr (std::is_same_v<From, float> && at::vec::is_reduced_floating_point_v<To>) {
    // at::vec::convert rounds one number at a time here.
    constexpr int64_t kLanes = at::vec::Vectorized<float>::size();
    const int64_t whole = count - count % (2 * kLanes);
    for (int64_t j = 0; j < whole; j += 2 * kLanes) {
      const auto low = at::vec::Vectorized<float>::loadu(from + j);
      const auto high = at::vec::Vectorized<float>::loadu(from + j + kLanes);
      at::vec::convert_from_float<To>(low, high).store(to + j);
    }
    at::vec::convert(from + whole, to + whole, count - whole);
  } else {
    at::vec::convert(from, to, count);
  }
}

// The values as To: where they are when they are of that type already, or converted into buffer.
template <typename To, typename From>
const To* converted(const From* from, To* buffer, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
  } else {
    convert(from, buffer, count);
    return buffer;
  }
}

// Where to compute values that end up in to: there, or in buffer when to is narrower. settle() then moves them.
template <typename Wide, typename To>
Wide* in_place_or(To* to, Wide* buffer) {
  if constexpr (std::is_same_v<To, Wide>) {
    return to;
  } else {
    return buffer;
  }
}

template <typename Wide, typename To>
void settle(const Wide* values, To* to, int64_t count) {
  if constexpr (!std::is_same_v<To, Wide>) {
    convert(values, to, count);
  }
}

} // namespace petl
