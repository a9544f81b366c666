"""Holds what the Triton kernels share: tile order, pointer choice, the dropout mask, sums of parts.

Every product accumulates in fp32 and asks for `input_precision="ieee"`, which matters for fp32 inputs only:
TF32 would miss the error criterion of the ops. No float atomics anywhere: sums over tokens are split into parts
that `sum_partials` adds in a fixed order, so two runs agree bitwise.

A load that feeds a product in a loop feeds nothing else. On sm_90 a product still reads shared memory when the next
step has begun, and Triton's pipeline gives its operand a buffer more for that only if the product is the load's one
use; else the copy for a later step overwrites what the product reads. So a sum of the same tile has a load of its own,
a step ahead: Triton cannot take the two for one, and it hits the L2 cache. tests/backends/triton_races.py finds what
breaks this in the compiled code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.launch import launch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (tokens, K) whose last stride is 1; a view wherever the strides allow it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def sum_partials(partials: torch.Tensor, outs: list[torch.Tensor]) -> None:
    """outs, end to end = the sum of `partials` (splits, elements) over the splits, in each out's dtype."""
    sizes = tuple(out.numel() for out in outs)
    block = config.SUM_BLOCK
    grid = (config.cdiv(max(sizes), block),)
    splits, total = partials.shape
    launch(_sum_kernel, grid, partials, tuple(outs), sizes, splits, total, BLOCK=block, warps=4, stages=1)


@triton.jit
def _sum_kernel(partials, outs, sizes, splits, total, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = 0
    for i in tl.static_range(len(outs)):
        inside = index < sizes[i]
        acc = tl.zeros((BLOCK,), tl.float32)
        pointers = partials + start + index
        for _ in range(splits):
            acc += tl.load(pointers, mask=inside, other=0.0)
            pointers += total
        tl.store(outs[i] + index, acc.to(outs[i].dtype.element_ty), mask=inside)
        start += sizes[i]


@triton.jit
def load(pointers, row_inside, col_inside):
    """A tile, with zeros outside."""
    return tl.load(pointers, mask=row_inside[:, None] & col_inside[None, :], other=0.0)


@triton.jit
def load_rows(pointer, stride, start, stop, cols, col_inside, ROWS: tl.constexpr):
    """Rows start to start + ROWS of a matrix, with zeros from row `stop` on."""
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return load(pointer + rows[:, None] * stride + cols[None, :], rows < stop, col_inside)


@triton.jit
def store(pointers, tile, row_inside, col_inside):
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile order that walks GROUP rows of tiles column by column: both operands stay in the L2 cache."""
    first = pid // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def pick(items, index):
    """items[index] for an index known only at run time; the items are pointers or numbers."""
    value = items[0]
    for i in tl.static_range(1, len(items)):
        value = tl.where(index == i, items[i], value)
    return value


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """`number`, which ALIGN divides, in a form that shows it: Triton itself only notices multiples of 16."""
    return number // ALIGN * ALIGN


@triton.jit
def stacked_rows(matrices, sizes, index, stride):
    """Pointers to rows `index` of matrices stacked on top of each other (matrix i has sizes[i] rows)."""
    pointers = matrices[0] + index * stride
    start = 0
    for i in tl.static_range(1, len(matrices)):
        start += sizes[i - 1]
        pointers = tl.where(index >= start, matrices[i] + (index - start) * stride, pointers)
    return pointers


@triton.jit
def total_size(sizes):
    total = 0
    for i in tl.static_range(len(sizes)):
        total += sizes[i]
    return total


@triton.jit
def start_of(sizes, index):
    """sizes[0] + ... + sizes[index - 1]"""
    start = 0
    for i in tl.static_range(len(sizes) - 1):
        start = tl.where(index > i, start + sizes[i], start)
    return start


@triton.jit
def drop(tile, seed, rows, first, K, threshold, keep_scale, QUADS: tl.constexpr):
    """Inverted dropout of a tile whose columns start at `first`, with `threshold` = floor(p * 2^32).

    The mask is never stored: element i = row * K + column of the (tokens, K) input is kept iff output i % 4 of
    Philox4x32-10 at counter i // 4 is at least the threshold. QUADS: 4 divides K and `first`, so that a counter's
    four elements lie side by side in a row and are decided together; otherwise each element computes its own counter.
    """
    COLS: tl.constexpr = tile.shape[1]
    seed, threshold = tl.load(seed), threshold.to(tl.uint32, bitcast=True)
    if QUADS:
        counter = rows[:, None].to(tl.uint32) * (K // 4) + (first // 4 + tl.arange(0, COLS // 4))[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, counter.to(tl.uint32))
        even = tl.interleave(r0 >= threshold, r2 >= threshold)
        odd = tl.interleave(r1 >= threshold, r3 >= threshold)
        kept = tl.interleave(even, odd)
    else:
        index = (rows[:, None].to(tl.uint32) * K + (first + tl.arange(0, COLS))[None, :]).to(tl.uint32)
        r0, r1, r2, r3 = tl.randint4x(seed, index // 4)
        output = index % 4
        random = tl.where(output < 2, tl.where(output == 0, r0, r1), tl.where(output == 2, r2, r3))
        kept = random >= threshold
    return tl.where(kept, tile.to(tl.float32) * keep_scale, 0.0).to(tile.dtype)


def dropout_arguments(
    dropout: float, seed: torch.Tensor | None, features: int
) -> tuple[torch.Tensor | None, int, float, dict[str, bool]]:
    """Returns what `drop` takes: (seed, threshold as a signed 32-bit number, 1 / (1 - p), constants)."""
    threshold = int(dropout * 2**32)
    threshold = threshold - 2**32 if threshold >= 2**31 else threshold
    dropped = dropout > 0
    constants = {"DROPOUT": dropped, "QUADS": dropped and features % 4 == 0}
    return seed if dropped else None, threshold, 1.0 / (1.0 - dropout), constants
