"""Shares pieces among the Triton kernels: tiles, the choice of pointers, the dropout mask, sums of parts.

Every product accumulates in fp32, with `input_precision="ieee"`, which matters for fp32 inputs only:
TF32 would miss the error criterion of the ops. No float atomics anywhere: sums over tokens are split into parts
that `sum_partials` adds in a fixed order, so two runs agree bitwise.

A load that feeds a product in a loop feeds nothing else. On sm_90 a product still reads shared memory when the next
step has begun, and Triton's pipeline gives its operand a buffer more for that only if the product is the load's one
use; else the copy for a later step overwrites what the product reads. So a sum of the same tile has a load of its own,
a step ahead: Triton cannot take the two for one, and it hits the L2 cache. tests/backends/triton_races.py finds what
breaks this in the compiled code.
"""

# A type checker cannot follow ``@triton.jit``: to it, kernels and ``tl.range`` never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.launch import launch
from petl_kernels.ops import philox


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns (..., K) as (tokens, K) whose last stride is 1; a view wherever the strides allow it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def sum_partials(partials: torch.Tensor, outs: list[torch.Tensor]) -> None:
    """Writes the sum of `partials` (splits, elements) over the splits into `outs`, end to end, in each one's dtype."""
    splits, total = partials.shape
    rows, cols = config.sum_block(splits, total)
    sizes = tuple(out.numel() for out in outs)
    launch(
        _sum_kernel, (config.cdiv(total, cols),), partials, tuple(outs), sizes, splits, total,
        ROWS=rows, COLS=cols, warps=4, stages=1,
    )  # fmt: skip


@triton.jit
def _sum_kernel(partials, outs, sizes, splits, total, ROWS: tl.constexpr, COLS: tl.constexpr):
    index = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, splits, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        acc += load(partials + rows[:, None] * total + index[None, :], rows < splits, index < total)
    summed = tl.sum(acc, 0)
    start = 0
    for i in tl.static_range(len(outs)):
        at = index - start
        tl.store(outs[i] + at, summed.to(outs[i].dtype.element_ty), mask=(at >= 0) & (at < sizes[i]))
        start += sizes[i]


@triton.jit
def load(pointers, row_inside, col_inside):
    """Returns a tile, with zeros outside."""
    return tl.load(pointers, mask=row_inside[:, None] & col_inside[None, :], other=0.0)


@triton.jit
def load_rows(pointer, stride, start, stop, cols, col_inside, ROWS: tl.constexpr):
    """Returns rows start to start + ROWS of a matrix, with zeros from row `stop` on."""
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return load(pointer + rows[:, None] * stride + cols[None, :], rows < stop, col_inside)


@triton.jit
def store(pointers, tile, row_inside, col_inside):
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


@triton.jit
def pick(items, index):
    """Returns items[index] for an index known only at run time; the items are pointers or numbers."""
    value = items[0]
    for i in tl.static_range(1, len(items)):
        value = tl.where(index == i, items[i], value)
    return value


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """Returns `number`, which ALIGN divides, in a form that shows it: Triton itself only detects multiples of 16."""
    return number // ALIGN * ALIGN


@triton.jit
def stacked_rows(matrices, sizes, index, stride):
    """Returns pointers to rows `index` of matrices stacked on top of each other (matrix i has sizes[i] rows)."""
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
    """Returns sizes[0] + ... + sizes[index - 1]."""
    start = 0
    for i in tl.static_range(len(sizes) - 1):
        start = tl.where(index > i, start + sizes[i], start)
    return start


@triton.jit
def drop(tile, seed, rows, first, K, threshold, keep_scale):
    """Returns a tile after inverted dropout, whose columns start at `first`, a multiple of 8, of rows of K.

    The mask is never stored (ops/philox.py). `threshold` is that of 16 bits times 2^16.
    """
    numbers = tl.reshape(_numbers(seed, rows, first, K, tile.shape[1]), tile.shape)
    kept = numbers >= threshold.to(tl.uint32, bitcast=True)
    return tl.where(kept, tile.to(tl.float32) * keep_scale, 0.0).to(tile.dtype)


@triton.jit
def keep_probabilities(seed, rows, first, K, threshold, COLS: tl.constexpr):
    """Returns which of COLS columns of attention's probabilities stay; 32 divides `first`, COLS and K.

    In the order of `philox.place` a thread of a tensor core holds the columns of whole counters: nothing is exchanged.
    """
    ROWS: tl.constexpr = rows.shape[0]
    numbers = tl.reshape(_numbers(seed, rows, first, K, COLS), (ROWS, COLS // 32, 4, 4, 2))
    numbers = tl.reshape(tl.permute(numbers, (0, 1, 3, 2, 4)), (ROWS, COLS))
    return numbers >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _numbers(seed, rows, first, K, COLS: tl.constexpr):
    """Returns the random numbers of COLS columns, (rows, counters, 2, 2, 2); the last three are the bits of a place.

    They are the upper 16 bits; where they are the high half of a word, its low half stays and decides nothing. Nothing
    is reshaped before all eight are there: a thread keeps the words of its counters.
    """
    counter = rows[:, None].to(tl.uint32) * tl.cdiv(K, 8) + (first // 8 + tl.arange(0, COLS // 8))[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed), counter.to(tl.uint32), 7)
    low = tl.join(tl.join(r0 << 16, r2 << 16), tl.join(r1 << 16, r3 << 16))
    return tl.join(low, tl.join(tl.join(r0, r2), tl.join(r1, r3)))


def dropout_arguments(
    dropout: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor | None, int, float, dict[str, bool]]:
    """Returns what `drop` takes: (seed, threshold as a signed 32-bit number, keep scale, constants)."""
    threshold = philox.threshold(dropout) << 16
    threshold = threshold - 2**32 if threshold >= 2**31 else threshold
    dropped = dropout > 0
    return seed if dropped else None, threshold, philox.keep_scale(dropout), {"DROPOUT": dropped}
