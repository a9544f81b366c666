// bench/candidates/wgmma/hopper.h for a CPU without a GPU: the same functions, so that the same kernel runs.
//
// Every thread of a block is a fiber, one of which runs at a time; the copy engine and the tensor cores work through
// what they were given at times of their own. A schedule says when: as late or as early as they may, or at random.
// So a slot that is read before it is full, or filled again too early, gives wrong numbers or is refused here. A block
// in which nobody can go on is a failure, not a hang: this is what a wrong byte count or parity comes to.
//
// What is modelled follows the PTX ISA and not the kernel: TMA swizzles by rows of a box, wgmma by address bits; a
// descriptor is decoded from its bits and read through its canonical layout; sums appear in a thread's registers, in
// its fragment's order, only after the wait, and are NaN before. Not modelled: time, and memory order inside the GPU.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define gridDim (emulation::grid_size())

struct float2 {
  float x, y;
};

namespace hopper {
struct Half {};
struct Bfloat16 {};

struct TensorMap {
  uint8_t* data = nullptr;
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns;
};
} // namespace hopper

namespace emulation {

struct Index {
  unsigned x;
};

struct Violation {
  std::string what;
};

inline void require(bool condition, const std::string& what) {
  if (!condition) {
    throw Violation{what};
  }
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) {
    size = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
  return bits >> 15 ? -size : size;
}

inline uint16_t float_to_half(float value) {
  const float size = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (!(size < 65520)) {
    return std::isnan(value) ? 0x7e00 : sign | 0x7c00;
  }
  // In units of the last place, to even; 1024 of them carry into the exponent.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + std::lrint(std::ldexp(size, 10 - exponent)));
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16); // to even
}

constexpr int kWarp = 32, kWarpgroup = 128, kStackBytes = 64 << 10;
constexpr uint32_t kSharedStart = 1040; // dynamic shared memory need not begin at a multiple of 1024
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// --- What a block consists of.

struct Barrier {
  int count, pending, phase = 0;
  int64_t bytes = 0; // announced and not come
  bool published = false;

  void finish_phase() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = count;
    }
  }
};

struct Copy {
  hopper::TensorMap map;
  uint32_t target, barrier;
  int column, row;
  uint32_t bytes() const { return 2 * map.box_rows * map.box_columns; }
};

// One wgmma of a warpgroup. Each of its four warps does its own 16 rows, when it comes to it.
struct Product {
  uint64_t left, right;
  bool accumulate, columns_in_rows;
  int width;
  float (*widen)(uint16_t);
  int issued = 0; // threads
  std::vector<uint32_t> pieces_read; // of 16 bytes
};

struct Warpgroup {
  std::vector<Product> products;
  size_t done[4] = {}; // by each warp
};

struct Gate { // where so many threads meet
  int waiting = 0, generation = 0;
};

struct Warp {
  Gate gate;
  std::array<uint32_t, kWarp> addresses; // of stmatrix
  std::array<std::array<uint32_t, 4>, kWarp> words;
  std::vector<uint32_t> unpublished; // pieces that it wrote
  int publishing = 0; // lanes that have passed the fence since
};

struct Store {
  hopper::TensorMap map;
  uint32_t source;
  int column, row;
  bool done = false;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  unsigned index;
  bool finished = false;
  std::function<bool()> ready; // empty: at once
  // wgmma
  size_t issued = 0;
  std::vector<size_t> committed; // products issued at each commit
  bool fenced = false;
  float* sums = nullptr; // while products are under way
  std::vector<float> hidden; // their sums
  std::vector<std::shared_ptr<Store>> stores;
  std::vector<size_t> committed_stores;
};

// Of 16 bytes of shared memory. Written: by a thread, and not yet shown to the copy engine.
enum class State : uint8_t { unwritten, arriving, there, written };

struct Block {
  unsigned index, blocks;
  std::vector<uint8_t> shared;
  std::vector<State> pieces; // of 16 bytes
  std::map<uint32_t, Barrier> barriers;
  std::deque<Copy> copies;
  std::deque<std::shared_ptr<Store>> stores;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<int, Gate> gates;
  Thread* running = nullptr;
  ucontext_t scheduler;
  std::string failure;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline int schedule = 0; // 0: as late as possible, 1: at once, above: at random, seeded

inline Index thread_index() { return {block->running->index}; }
inline Index block_index() { return {block->index}; }
inline Index grid_size() { return {block->blocks}; }
inline Warpgroup& own_warpgroup() { return block->warpgroups[block->running->index / kWarpgroup]; }
inline Warp& own_warp() { return block->warps[block->running->index / kWarp]; }

// The running thread sleeps until `ready`.
inline void wait_until(std::function<bool()> ready) {
  if (!ready()) {
    Thread* self = block->running;
    self->ready = std::move(ready);
    swapcontext(&self->context, &block->scheduler);
  }
}

// Waits for the others; the last to come does what is to be done together.
inline void meet(Gate& gate, int threads, const std::function<void()>& together = [] {}) {
  const int generation = gate.generation;
  if (++gate.waiting == threads) {
    together();
    gate.waiting = 0;
    ++gate.generation;
  }
  wait_until([&gate, generation] { return gate.generation != generation; });
}

inline Barrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(address);
  require(found != block->barriers.end(), "no barrier at " + std::to_string(address));
  return found->second;
}

// --- The copy engine.

inline bool is_read_from(uint32_t first_piece, uint32_t pieces) {
  for (const Warpgroup& group : block->warpgroups) {
    const size_t done = *std::min_element(group.done, group.done + 4);
    for (size_t i = done; i < group.products.size(); ++i) {
      for (uint32_t piece : group.products[i].pieces_read) {
        if (piece - first_piece < pieces) {
          return true;
        }
      }
    }
  }
  return false;
}

inline void begin_copy(const Copy& copy) {
  require(copy.target % 1024 == 0, "a box with the 128-byte swizzle has to begin at a multiple of 1024");
  require(copy.target + copy.bytes() <= kSharedStart + block->shared.size(), "a box past the shared memory");
  require(barrier_at(copy.barrier).published, "the copy engine was given a barrier that it cannot see yet");
  const uint32_t first = (copy.target - kSharedStart) / 16, pieces = copy.bytes() / 16;
  require(!is_read_from(first, pieces), "a slot is filled while products still read it");
  for (uint32_t piece = first; piece < first + pieces; ++piece) {
    require(block->pieces[piece] != State::arriving, "two copies to the same place");
    block->pieces[piece] = State::arriving;
  }
  std::memset(&block->shared[16 * first], 0xff, 16 * pieces); // NaN in both types
  block->copies.push_back(copy);
}

// Calls move(address in memory, offset in shared memory) for each element of a box, the address null outside.
template <typename Move>
void for_each_element(const hopper::TensorMap& map, int first_column, int first_row, uint32_t address, Move move) {
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const int64_t row = first_row + r, column = first_column + c;
      const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
      const uint32_t piece = c / 8 ^ r % 8; // of the row's eight
      move(
          inside ? map.data + row * map.row_bytes + 2 * column : nullptr,
          address - kSharedStart + 128 * r + 16 * piece + 2 * (c % 8));
    }
  }
}

inline void finish_copy(size_t which) {
  const Copy copy = block->copies[which];
  block->copies.erase(block->copies.begin() + which);
  for_each_element(copy.map, copy.column, copy.row, copy.target, [](const uint8_t* from, uint32_t offset) {
    const uint16_t zero = 0;
    std::memcpy(&block->shared[offset], from ? static_cast<const void*>(from) : &zero, 2);
  });
  const uint32_t first = (copy.target - kSharedStart) / 16;
  std::fill_n(block->pieces.begin() + first, copy.bytes() / 16, State::there);
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes();
  barrier.finish_phase();
}

inline void begin_store(const Store& store) {
  require(store.source % 1024 == 0, "a box with the 128-byte swizzle has to begin at a multiple of 1024");
  for (int piece = 0; piece < store.map.box_rows * 8; ++piece) {
    const uint32_t place = (store.source - kSharedStart) / 16 + piece;
    require(place < block->pieces.size() && block->pieces[place] == State::there, "a store of what cannot be seen yet");
  }
  block->stores.push_back(std::make_shared<Store>(store));
  block->running->stores.push_back(block->stores.back());
}

inline void finish_store(size_t which) {
  const std::shared_ptr<Store> store = block->stores[which];
  block->stores.erase(block->stores.begin() + which);
  for_each_element(store->map, store->column, store->row, store->source, [](uint8_t* to, uint32_t offset) {
    if (to) {
      std::memcpy(to, &block->shared[offset], 2);
    }
  });
  store->done = true;
}

inline bool is_stored_from(uint32_t address) {
  return std::any_of(block->stores.begin(), block->stores.end(), [&](const std::shared_ptr<Store>& store) {
    return address - store->source < static_cast<uint32_t>(128 * store->map.box_rows);
  });
}

// What stmatrix does once its 32 lanes have come.
inline void write_matrices(Warp& warp) {
  for (int i = 0; i < kWarp; ++i) { // row i % 8 of matrix i / 8
    const uint32_t address = warp.addresses[i];
    require(address % 16 == 0 && address - kSharedStart + 16 <= block->shared.size(), "stmatrix outside");
    require(!is_stored_from(address), "stmatrix over what a store still reads");
    for (int j = 0; j < 4; ++j) {
      std::memcpy(&block->shared[address - kSharedStart + 4 * j], &warp.words[4 * (i % 8) + j][i / 8], 4);
    }
    block->pieces[(address - kSharedStart) / 16] = State::written;
    warp.unpublished.push_back((address - kSharedStart) / 16);
  }
  warp.publishing = 0;
}

// --- The tensor cores.

// The address of an operand's element: `i` of M or N, `k` of the contraction.
inline uint32_t address_of(uint64_t descriptor, bool columns_in_rows, int i, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t plain = columns_in_rows ? start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                                         : start + i / 8 * stride + i % 8 * 128 + 2 * k;
  return plain ^ (plain >> 7 & 7) << 4;
}

inline void check_descriptor(uint64_t descriptor) {
  require(descriptor >> 62 == 1, "a descriptor without the 128-byte swizzle");
  require((descriptor >> 49 & 7) == 0, "a descriptor with a base offset, for a tile at a multiple of 1024");
}

inline float element(uint64_t descriptor, bool columns_in_rows, int i, int k, float (*widen)(uint16_t)) {
  const uint32_t offset = address_of(descriptor, columns_in_rows, i, k) - kSharedStart;
  require(offset + 2 <= block->shared.size(), "wgmma reads outside the shared memory");
  require(block->pieces[offset / 16] == State::there, "wgmma reads what has not come yet");
  uint16_t bits;
  std::memcpy(&bits, &block->shared[offset], 2);
  return widen(bits);
}

inline void run_product(int group, int warp) {
  Warpgroup& own = block->warpgroups[group];
  const Product& product = own.products[own.done[warp]++];
  std::vector<float> left(16 * 16), right(16 * product.width);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) {
      left[16 * k + row] = element(product.left, false, 16 * warp + row, k, product.widen);
    }
    for (int column = 0; column < product.width; ++column) {
      right[product.width * k + column] =
          element(product.right, product.columns_in_rows, column, k, product.widen);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& thread = block->threads[group * kWarpgroup + warp * kWarp + lane];
    for (int i = 0; i < product.width / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = product.accumulate ? thread.hidden[i] : 0.0f;
      for (int k = 0; k < 16; ++k) {
        sum += left[16 * k + row] * right[product.width * k + column];
      }
      thread.hidden[i] = sum;
    }
  }
}

inline bool can_run_product(int group, int warp) {
  const Warpgroup& own = block->warpgroups[group];
  return own.done[warp] < own.products.size() && own.products[own.done[warp]].issued == kWarpgroup;
}

inline void issue(const Product& product, float* sums) {
  Thread& self = *block->running;
  Warpgroup& group = own_warpgroup();
  require(self.fenced, "wgmma without a wgmma.fence before its group");
  if (self.issued == group.products.size()) {
    check_descriptor(product.left);
    check_descriptor(product.right);
    group.products.push_back(product);
    std::vector<uint32_t>& read = group.products.back().pieces_read;
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < std::max(64, product.width); ++i) {
        if (i < 64) {
          read.push_back((address_of(product.left, false, i, k) - kSharedStart) / 16);
        }
        read.push_back((address_of(product.right, product.columns_in_rows, i, k) - kSharedStart) / 16);
      }
    }
    std::sort(read.begin(), read.end());
    read.erase(std::unique(read.begin(), read.end()), read.end());
  }
  Product& shared = group.products[self.issued];
  require(
      shared.left == product.left && shared.right == product.right && shared.accumulate == product.accumulate &&
          shared.width == product.width && shared.columns_in_rows == product.columns_in_rows,
      "the threads of a warpgroup disagree about a wgmma");
  if (self.sums == nullptr) { // the first under way: the registers belong to it until the wait
    self.sums = sums;
    self.hidden.assign(sums, sums + product.width / 2);
    std::fill_n(sums, product.width / 2, kPoison);
  }
  require(self.sums == sums, "two sets of sums under way");
  ++self.issued;
  ++shared.issued;
}

// --- The schedule.

inline bool finish_something(std::mt19937& random) {
  std::vector<std::pair<int, int>> products;
  for (int group = 0; group < static_cast<int>(block->warpgroups.size()); ++group) {
    for (int warp = 0; warp < 4; ++warp) {
      if (can_run_product(group, warp)) {
        products.push_back({group, warp});
      }
    }
  }
  const size_t copies = block->copies.size(), choices = copies + block->stores.size() + products.size();
  if (choices == 0) {
    return false;
  }
  const size_t choice = random() % choices;
  if (choice < copies) {
    finish_copy(choice);
  } else if (choice - copies < block->stores.size()) {
    finish_store(choice - copies);
  } else {
    const auto [group, warp] = products[choice - copies - block->stores.size()];
    run_product(group, warp);
  }
  return true;
}

inline void run_thread(Thread& thread) {
  thread.ready = nullptr;
  block->running = &thread;
  swapcontext(&block->scheduler, &thread.context);
  block->running = nullptr;
}

inline void thread_main() {
  try {
    block->body();
  } catch (const Violation& violation) {
    block->failure = violation.what;
  }
  block->running->finished = true;
  swapcontext(&block->running->context, &block->scheduler);
}

inline std::string stuck() {
  std::string text = "nobody can go on:";
  for (const auto& [address, barrier] : block->barriers) {
    if (barrier.bytes != 0 || barrier.pending != barrier.count) {
      text += " barrier " + std::to_string(address) + " misses " + std::to_string(barrier.pending) + " arrivals and " +
          std::to_string(barrier.bytes) + " bytes;";
    }
  }
  return text;
}

inline void run_threads() {
  std::mt19937 random(schedule);
  const size_t count = block->threads.size();
  bool all_finished = false;
  while (!all_finished && block->failure.empty()) {
    bool progress = false;
    all_finished = true;
    const size_t first = schedule > 1 ? random() % count : 0;
    for (size_t i = 0; i < count && block->failure.empty(); ++i) {
      Thread& thread = block->threads[(first + i) % count];
      all_finished &= thread.finished;
      if (thread.finished || (schedule > 1 && random() % 4 == 0) || (thread.ready && !thread.ready())) {
        progress |= !thread.finished && !(thread.ready && !thread.ready());
        continue;
      }
      progress = true;
      run_thread(thread);
      while (schedule == 1 && finish_something(random)) {
      }
      if (schedule > 1 && random() % 32 == 0) {
        finish_something(random);
      }
    }
    if (!progress && !all_finished && block->failure.empty() && !finish_something(random)) {
      block->failure = stuck();
    }
  }
}

inline void check_nothing_is_left() {
  require(block->copies.empty(), "a block ends while a copy is under way");
  require(block->stores.empty(), "a block ends while a store still reads its shared memory");
  for (const Warpgroup& group : block->warpgroups) {
    require(
        std::all_of(group.done, group.done + 4, [&](size_t done) { return done == group.products.size(); }),
        "a block ends while products are under way");
  }
  for (const auto& [address, barrier] : block->barriers) {
    require(barrier.bytes == 0, "a block ends while a barrier waits for bytes");
  }
}

inline std::string run_block(
    unsigned index, unsigned blocks, int threads, int shared_bytes, std::function<void()> body) {
  Block own;
  own.index = index;
  own.blocks = blocks;
  own.shared.assign(shared_bytes, 0xff);
  own.pieces.assign(shared_bytes / 16 + 1, State::unwritten);
  own.threads.resize(threads);
  own.warpgroups.resize(threads / kWarpgroup);
  own.warps.resize(threads / kWarp);
  own.body = std::move(body);
  block = &own;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = own.threads[i];
    thread.index = i;
    thread.stack.reset(new uint8_t[kStackBytes]);
    std::memset(thread.stack.get(), 0xff, kStackBytes); // registers that nobody wrote are NaN
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, thread_main, 0);
  }
  try {
    run_threads();
    if (own.failure.empty()) {
      check_nothing_is_left();
    }
  } catch (const Violation& violation) {
    own.failure = violation.what;
  }
  block = nullptr;
  return own.failure;
}

} // namespace emulation

extern "C" inline void petl_emulation_schedule(int schedule) __attribute__((used, visibility("default")));
extern "C" inline void petl_emulation_schedule(int schedule) { emulation::schedule = schedule; }

// --- The functions of hopper.h.

namespace hopper {

using emulation::block;
using emulation::require;

inline uint32_t shared_memory() { return emulation::kSharedStart; }

inline void block_sync() { emulation::meet(block->gates[0], static_cast<int>(block->threads.size())); }

inline void warpgroup_sync(int number) {
  require(number > 0 && number < 16, "named barriers are 1 to 15");
  emulation::meet(block->gates[number], emulation::kWarpgroup);
}

inline void barrier_init(uint32_t barrier, uint32_t count) {
  require(barrier % 8 == 0 && barrier + 8 <= emulation::kSharedStart + block->shared.size(), "a barrier outside");
  require(block->barriers.count(barrier) == 0, "two barriers at one place");
  emulation::Barrier made;
  made.count = made.pending = static_cast<int>(count);
  block->barriers[barrier] = made;
}

inline void barriers_publish() {
  for (auto& [address, barrier] : block->barriers) {
    barrier.published = true;
  }
}

inline void barrier_arrive(uint32_t barrier) {
  emulation::Barrier& own = emulation::barrier_at(barrier);
  require(own.pending > 0, "more arrivals at a barrier than it counts");
  --own.pending;
  own.finish_phase();
}

inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  emulation::barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const emulation::Barrier& own = emulation::barrier_at(barrier);
  emulation::wait_until([&own, parity] { return static_cast<uint32_t>(own.phase & 1) != parity; });
}

inline void load_box(uint32_t target, const TensorMap& map, int column, int row, uint32_t barrier) {
  emulation::begin_copy({map, target, barrier, column, row});
}

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

template <int kSize>
void products_begin(float (&)[kSize]) {
  block->running->fenced = true;
}

inline void products_commit() {
  block->running->committed.push_back(block->running->issued);
  block->running->fenced = false;
}

template <int kPending, int kSize>
void products_wait(float (&sums)[kSize]) {
  emulation::Thread& self = *block->running;
  const int groups = static_cast<int>(self.committed.size()) - kPending;
  const size_t wanted = groups > 0 ? self.committed[groups - 1] : 0;
  const size_t& done = emulation::own_warpgroup().done[self.index / emulation::kWarp % 4];
  emulation::wait_until([&done, wanted] { return done >= wanted; });
  if (kPending == 0 && self.sums != nullptr && done == self.issued) {
    std::copy(self.hidden.begin(), self.hidden.end(), sums);
    self.sums = nullptr;
  }
}

template <typename Element, int kTransposed, int kSize>
void multiply(float (&sums)[kSize], uint64_t left, uint64_t right, int accumulate) {
  emulation::Product product;
  product.left = left;
  product.right = right;
  product.accumulate = accumulate != 0;
  product.columns_in_rows = kTransposed != 0;
  product.width = 2 * kSize;
  product.widen = std::is_same_v<Element, Half> ? emulation::half_to_float : emulation::bfloat16_to_float;
  emulation::issue(product, sums);
}

inline void store_matrices(uint32_t address, const uint32_t (&words)[4]) {
  emulation::Warp& warp = emulation::own_warp();
  const unsigned lane = block->running->index % emulation::kWarp;
  warp.addresses[lane] = address;
  std::copy(words, words + 4, warp.words[lane].begin());
  emulation::meet(warp.gate, emulation::kWarp, [&warp] { emulation::write_matrices(warp); });
}

inline void writes_publish() {
  emulation::Warp& warp = emulation::own_warp();
  if (++warp.publishing == emulation::kWarp) {
    for (uint32_t piece : warp.unpublished) {
      block->pieces[piece] = emulation::State::there;
    }
    warp.unpublished.clear();
  }
}

inline void store_box(const TensorMap& map, int column, int row, uint32_t source) {
  emulation::begin_store({map, source, column, row});
}

inline void stores_commit() {
  block->running->committed_stores.push_back(block->running->stores.size());
}

template <int kPending>
void stores_wait_until_read() {
  const emulation::Thread& self = *block->running;
  const int groups = static_cast<int>(self.committed_stores.size()) - kPending;
  const size_t wanted = groups > 0 ? self.committed_stores[groups - 1] : 0;
  emulation::wait_until([&self, wanted] {
    return std::all_of(
        self.stores.begin(), self.stores.begin() + wanted, [](const auto& store) { return store->done; });
  });
}

template <typename Element>
uint32_t pack(float low, float high) {
  const auto round = std::is_same_v<Element, Half> ? emulation::float_to_half : emulation::float_to_bfloat16;
  return round(low) | static_cast<uint32_t>(round(high)) << 16;
}

template <typename Element>
float2 unpack(uint32_t word) {
  const auto widen = std::is_same_v<Element, Half> ? emulation::half_to_float : emulation::bfloat16_to_float;
  return {widen(static_cast<uint16_t>(word)), widen(static_cast<uint16_t>(word >> 16))};
}

inline const char* encode_map(
    TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_bytes, bool, uint32_t box_rows,
    uint32_t box_columns) {
  map = {static_cast<uint8_t*>(const_cast<void*>(data)), rows, columns, row_bytes, static_cast<int>(box_rows),
         static_cast<int>(box_columns)};
  const bool allowed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0 && rows > 0 && columns > 0 &&
      box_rows > 0 && box_rows <= 256 && box_columns == 64; // 128 bytes: the swizzle's span
  return allowed ? nullptr : "cuTensorMapEncodeTiled would refuse a matrix";
}

template <typename Arguments>
const char* launch(
    void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void*, const Arguments& arguments) {
  static std::string failure;
  failure = shared_bytes > 227 * 1024 ? "more shared memory than a block can have" : "";
  for (int i = 0; i < blocks && failure.empty(); ++i) {
    failure = emulation::run_block(i, blocks, threads, shared_bytes, [&] { kernel(arguments); });
  }
  return failure.empty() ? nullptr : failure.c_str();
}

} // namespace hopper
