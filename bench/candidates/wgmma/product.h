// out = Σ_g left_g right_g + scale · rank_left rank_right + bias, 16-bit in and out, sums in fp32: one kernel, sm_90a.
//
// A block has three warpgroups. One thread of the first copies tiles to a ring of slots in shared memory; the other
// two warpgroups multiply them, 64 rows of the output tile each, and write those. A block takes every gridDim-th output
// tile; the copies run on into the next tile while this one is being written.
//
// The rank part comes first and is multiplied by `scale` in fp32 before the sums go on: neither factor is rounded
// again. It is the same ring and the same instructions, for as much of a slot as there is rank.
//
// A slot's two barriers: `full` ends a phase when all bytes of its tiles have come, `empty` when each of the eight
// consuming warps has seen the products end that read it.
#pragma once

#include <hopper.h> // of this folder, or the emulation's

#include "descriptor.h"

namespace wgmma {

constexpr int kMaxTerms = 3;
constexpr int kRows = 128, kDepth = 64, kDepthOfOne = 16; // of an output tile, of a slot, of one instruction
constexpr int kWarp = 32, kWarpgroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kOwnRows = kRows / kConsumers; // of an output tile, each consumer's
constexpr int kColumnsOfBox = kSwizzleBytes / 2; // TMA's boxes are as wide as the swizzle
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "one block's registers");
constexpr int kGroup = 8; // rows of tiles that are walked column by column, so that both operands stay in the L2 cache

// A block's shared memory, by address. kWidth: columns of an output tile.
template <int kWidth>
struct Shared {
  static constexpr int kSlots = kWidth == 256 ? 4 : 6;
  static constexpr int kLeftBytes = kRows * kDepth * 2, kRightBytes = kWidth * kDepth * 2;
  static constexpr int kSlotBytes = kLeftBytes + kRightBytes;
  // Each consumer has two places to put 64 columns of its output rows together.
  static constexpr int kOutBytes = kOwnRows * kSwizzleBytes, kOuts = 2 * kConsumers;
  static constexpr int kBarrierBytes = 8;
  // The last term: dynamic shared memory begins where it likes, tiles at a multiple of 1024.
  static constexpr int kBytes = kSlots * (kSlotBytes + 2 * kBarrierBytes) + kOuts * kOutBytes + kAtomBytes;
  static_assert(kBytes <= 227 * 1024, "a block's shared memory");

  uint32_t slots, outs = slots + kSlots * kSlotBytes, barriers = outs + kOuts * kOutBytes;

  __device__ uint32_t left(int slot) const { return slots + slot * kSlotBytes; }
  __device__ uint32_t right(int slot) const { return left(slot) + kLeftBytes; }
  __device__ uint32_t out(int consumer, int which) const { return outs + (2 * consumer + which) * kOutBytes; }
  __device__ uint32_t full(int slot) const { return barriers + slot * kBarrierBytes; }
  __device__ uint32_t empty(int slot) const { return full(slot) + kSlots * kBarrierBytes; }
};

// A place in the ring, and the parity of the phase that its barriers are in.
template <int kWidth>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    slot = slot + 1 == Shared<kWidth>::kSlots ? 0 : slot + 1;
    parity ^= slot == 0;
  }
};

struct Operands {
  hopper::TensorMap left[kMaxTerms], right[kMaxTerms], rank_left, rank_right, out;
  int steps[kMaxTerms]; // of kDepth along the contraction
  int terms, rank, rows, columns;
  const uint16_t* bias; // or null; of a product that is not by rows
  float scale;
};

struct OutputTile {
  int row, column; // of its first element
};

template <int kWidth>
__device__ inline int tiles_of(const Operands& given) {
  return ((given.rows + kRows - 1) / kRows) * ((given.columns + kWidth - 1) / kWidth);
}

template <int kWidth>
__device__ inline OutputTile tile_at(const Operands& given, int index) {
  const int tiles_down = (given.rows + kRows - 1) / kRows, tiles_across = (given.columns + kWidth - 1) / kWidth;
  const int first = index / (kGroup * tiles_across) * kGroup, inside = index % (kGroup * tiles_across);
  const int height = tiles_down - first < kGroup ? tiles_down - first : kGroup;
  return {(first + inside % height) * kRows, inside / height * kWidth};
}

// --- The producer: one thread.

// Copies what one slot holds; `start` is where it begins along the contraction.
// kByRows: the contraction runs down the rows of `right`, 64 columns of which TMA brings at a time.
template <int kWidth, bool kByRows>
__device__ inline void fill(
    const Shared<kWidth>& shared, Cursor<kWidth>& cursor, const hopper::TensorMap& left,
    const hopper::TensorMap& right, OutputTile tile, int start) {
  const int slot = cursor.slot;
  const uint32_t full = shared.full(slot);
  // Parity 1 of a new barrier counts as past: the first round finds every slot empty.
  hopper::barrier_wait(shared.empty(slot), cursor.parity ^ 1);
  hopper::barrier_arrive_expecting(full, Shared<kWidth>::kSlotBytes);
  hopper::load_box(shared.left(slot), left, start, tile.row, full);
  if constexpr (kByRows) {
    using Layout = ColumnsInRows<kDepth>;
    for (int box = 0; box < kWidth / kColumnsOfBox; ++box) {
      const int column = tile.column + box * kColumnsOfBox;
      hopper::load_box(shared.right(slot) + box * Layout::kChunkBytes, right, column, start, full);
    }
  } else {
    hopper::load_box(shared.right(slot), right, start, tile.column, full);
  }
  cursor.advance();
}

template <int kWidth, bool kByRows>
__device__ inline void produce(const Shared<kWidth>& shared, const Operands& given) {
  Cursor<kWidth> cursor;
  for (int index = blockIdx.x; index < tiles_of<kWidth>(given); index += gridDim.x) {
    const OutputTile tile = tile_at<kWidth>(given, index);
    for (int start = 0; start < given.rank; start += kDepth) {
      fill<kWidth, kByRows>(shared, cursor, given.rank_left, given.rank_right, tile, start);
    }
    for (int term = 0; term < given.terms; ++term) {
      for (int step = 0; step < given.steps[term]; ++step) {
        fill<kWidth, kByRows>(shared, cursor, given.left[term], given.right[term], tile, step * kDepth);
      }
    }
  }
}

// --- The consumers: two warpgroups.

// Issues the products of 16 of the contraction, of the slot's piece `piece`, for 64 rows of the tile.
template <typename Element, int kWidth, bool kByRows>
__device__ inline void multiply_piece(
    float (&sums)[kWidth / 2], const Shared<kWidth>& shared, int slot, int consumer, int piece, bool accumulate) {
  using Left = ContractionInRows;
  using Right = std::conditional_t<kByRows, ColumnsInRows<kDepth>, ContractionInRows>;
  const uint32_t own_rows = shared.left(slot) + consumer * kOwnRows * kSwizzleBytes;
  hopper::multiply<Element, kByRows>(
      sums, Left::at(own_rows + piece * Left::kStep), Right::at(shared.right(slot) + piece * Right::kStep), accumulate);
}

// One arrival for each warp: what a warp has waited for is its own part of the products.
template <int kWidth>
__device__ inline void release(const Shared<kWidth>& shared, int slot) {
  if (threadIdx.x % kWarp == 0) {
    hopper::barrier_arrive(shared.empty(slot));
  }
}

// sums = scale · rank_left rank_right
template <typename Element, int kWidth, bool kByRows>
__device__ inline void seed(
    float (&sums)[kWidth / 2], const Shared<kWidth>& shared, Cursor<kWidth>& cursor, int consumer,
    const Operands& given) {
  for (int start = 0; start < given.rank; start += kDepth) {
    hopper::barrier_wait(shared.full(cursor.slot), cursor.parity);
    // One group each: ptxas cannot pair a fence with products that a branch may leave out.
#pragma unroll 1
    for (int piece = 0; piece < kDepth / kDepthOfOne && start + piece * kDepthOfOne < given.rank; ++piece) {
      hopper::products_begin(sums);
      multiply_piece<Element, kWidth, kByRows>(sums, shared, cursor.slot, consumer, piece, start + piece > 0);
      hopper::products_commit();
      hopper::products_wait<0>(sums);
    }
    release(shared, cursor.slot);
    cursor.advance();
  }
  if (given.scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      sums[i] *= given.scale;
    }
  }
}

// sums += Σ_g left_g right_g. The products of one slot are always under way while the next slot is waited for.
template <typename Element, int kWidth, bool kByRows>
__device__ inline void accumulate(
    float (&sums)[kWidth / 2], const Shared<kWidth>& shared, Cursor<kWidth>& cursor, int consumer,
    int steps) {
  int previous = -1, step = 0;
  do { // at least once: with a path around the loop, ptxas (13.0) would wait after every product
    hopper::barrier_wait(shared.full(cursor.slot), cursor.parity);
    hopper::products_begin(sums);
#pragma unroll
    for (int piece = 0; piece < kDepth / kDepthOfOne; ++piece) {
      multiply_piece<Element, kWidth, kByRows>(sums, shared, cursor.slot, consumer, piece, true);
    }
    hopper::products_commit();
    hopper::products_wait<1>(sums);
    if (previous >= 0) {
      release(shared, previous);
    }
    previous = cursor.slot;
    cursor.advance();
  } while (++step < steps);
  hopper::products_wait<0>(sums);
  release(shared, previous);
}

// Two neighbouring values of the bias, zeros past its end.
template <typename Element>
__device__ inline float2 bias_at(const Operands& given, int column) {
  const bool there = given.bias != nullptr && column < given.columns; // 8 divides the number of columns
  return hopper::unpack<Element>(there ? *reinterpret_cast<const uint32_t*>(given.bias + column) : 0);
}

// Adds the bias, rounds, writes: 64 columns at a time are put together in shared memory, in the swizzle, and TMA writes
// them while the next 64, or the next tile, are under way.
template <typename Element, int kWidth, bool kByRows>
__device__ inline void write(
    float (&sums)[kWidth / 2], const Shared<kWidth>& shared, const Operands& given, OutputTile tile, int consumer) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
  const int row = 16 * warp + lane % 16; // where this lane's 16 bytes go: stmatrix' matrices 0 and 2, below 1 and 3
  const bool leader = threadIdx.x % kWarpgroup == 0;
#pragma unroll
  for (int box = 0; box < kWidth / kColumnsOfBox; ++box) {
    const uint32_t target = shared.out(consumer, box % 2);
    const int first_column = tile.column + box * kColumnsOfBox;
    if (leader) {
      hopper::stores_wait_until_read<1>(); // what was in `target`, two boxes ago
    }
    hopper::warpgroup_sync(1 + consumer);
#pragma unroll
    for (int run = 0; run < kColumnsOfBox / 16; ++run) { // of 16 columns
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) { // columns 8 (i / 2) and so on, rows lane / 4 + 8 (i % 2): wgmma's own order
        const float* pair = &sums[8 * (box * kColumnsOfBox / 16 + run) + 2 * i];
        float2 bias = {0.0f, 0.0f};
        if constexpr (!kByRows) {
          bias = bias_at<Element>(given, first_column + 16 * run + 8 * (i / 2) + 2 * (lane % 4));
        }
        words[i] = hopper::pack<Element>(pair[0] + bias.x, pair[1] + bias.y);
      }
      const int piece = 2 * run + lane / 16;
      hopper::store_matrices(target + row * kSwizzleBytes + (piece ^ row % 8) * 16, words);
    }
    hopper::writes_publish();
    hopper::warpgroup_sync(1 + consumer);
    if (leader) {
      hopper::store_box(given.out, first_column, tile.row + consumer * kOwnRows, target);
      hopper::stores_commit();
    }
  }
}

template <typename Element, int kWidth, bool kByRows>
__device__ inline void consume(const Shared<kWidth>& shared, const Operands& given) {
  const int consumer = threadIdx.x / kWarpgroup - 1;
  int steps = 0;
  for (int term = 0; term < given.terms; ++term) {
    steps += given.steps[term];
  }
  Cursor<kWidth> cursor;
  for (int index = blockIdx.x; index < tiles_of<kWidth>(given); index += gridDim.x) {
    float sums[kWidth / 2];
    seed<Element, kWidth, kByRows>(sums, shared, cursor, consumer, given);
    accumulate<Element, kWidth, kByRows>(sums, shared, cursor, consumer, steps);
    write<Element, kWidth, kByRows>(sums, shared, given, tile_at<kWidth>(given, index), consumer);
  }
  hopper::stores_wait_until_read<0>(); // shared memory ends with the block
}

template <typename Element, int kWidth, bool kByRows>
__global__ void __launch_bounds__(kThreads, 1) product(const __grid_constant__ Operands given) {
  const Shared<kWidth> shared{(hopper::shared_memory() + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Shared<kWidth>::kSlots; ++slot) {
      hopper::barrier_init(shared.full(slot), 1);
      hopper::barrier_init(shared.empty(slot), kConsumers * kWarpgroup / kWarp);
    }
    hopper::barriers_publish();
  }
  hopper::block_sync();
  if (threadIdx.x < kWarpgroup) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<kWidth, kByRows>(shared, given);
    }
  } else {
    hopper::take_registers<kConsumerRegisters>();
    consume<Element, kWidth, kByRows>(shared, given);
  }
}

} // namespace wgmma
