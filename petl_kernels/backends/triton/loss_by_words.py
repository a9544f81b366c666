"""linear_cross_entropy by words in Triton: what lies between the products (``ops/loss_by_words.py`` has the formulas).

One program holds a row of a block of logits in registers, so a logit is read once and E written once: maximum, m, E and
Σ E come from the same numbers. A row of O is read and written only where m rises, which one program in a branch of its
own decides on the card. Before and after all blocks a program a row meets h and W_y, and O, W_y and the gradient, once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import launch
from petl_kernels.backends.triton.registry import serves
from petl_kernels.ops.loss_by_words import RISE


@serves
def linear_cross_entropy_begin(
    rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, word_sum: torch.Tensor | None
) -> torch.Tensor:
    count, d = rows.shape
    state = rows.new_empty(4, count, dtype=torch.float32)
    if count:
        block, warps = config.row_block(rows)
        layout = (count, d, rows.stride(0), weight.stride(0))
        launch(
            _begin_kernel, (count,), state, rows, weight, labels, word_sum, *layout, BLOCK=block, warps=warps, stages=1
        )
    return state


@serves
def linear_cross_entropy_words(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    state: torch.Tensor,
    total: torch.Tensor | None,
    fresh: bool,
) -> None:
    rows, words = logits.shape
    if rows == 0:
        return
    block: Any = triton.next_power_of_2(words)
    d = 0 if total is None else total.shape[1]
    launch(
        _words_kernel, (rows,), logits, labels, state, total, first, words, logits.stride(0), rows, d,
        FRESH=fresh, WHOLE=words == block, RISE=RISE, BLOCK=block, TOTAL_BLOCK=config.TOTAL_BLOCK,
        warps=config.word_warps(block), stages=1,
    )  # fmt: skip


@serves
def linear_cross_entropy_end(
    weight: torch.Tensor,
    labels: torch.Tensor,
    state: torch.Tensor,
    total: torch.Tensor | None,
    word_sum: torch.Tensor | None,
    label_weight: float,
    word_weight: float,
    dlosses: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    rows, (words, d) = labels.shape[0], weight.shape
    losses = torch.empty(rows, dtype=torch.float32, device=weight.device)
    if rows:
        block, warps = config.row_block(weight)
        layout = (rows, words, d, weight.stride(0))
        launch(
            _end_kernel, (rows,), losses, out, weight, labels, state, total, word_sum, dlosses,
            label_weight, 1 - label_weight, word_weight, *layout, BLOCK=block, warps=warps, stages=1,
        )  # fmt: skip
    return losses


@triton.jit
def _begin_kernel(state, rows, weight, labels, word_sum, count, d, stride, word_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    rows += row.to(tl.int64) * stride
    weight += tl.load(labels + row) * word_stride
    of_label, of_words = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        h = tl.load(rows + cols, mask=cols < d, other=0.0).to(tl.float32)
        of_label += h * tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)
        if word_sum is not None:
            of_words += h * tl.load(word_sum + cols, mask=cols < d, other=0.0)
    label_logit = tl.sum(of_label, 0)
    state += row
    tl.store(state, label_logit)
    tl.store(state + count, 0.0)
    tl.store(state + 2 * count, label_logit)
    tl.store(state + 3 * count, tl.sum(of_words, 0))


@triton.jit
def _words_kernel(
    logits, labels, state, total, first, words, stride, rows, d,
    FRESH: tl.constexpr, WHOLE: tl.constexpr, RISE: tl.constexpr, BLOCK: tl.constexpr, TOTAL_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    state += row
    cols = tl.arange(0, BLOCK)
    if WHOLE:
        z = tl.load(logits + cols).to(tl.float32)
    else:
        z = tl.load(logits + cols, mask=cols < words, other=float("-inf")).to(tl.float32)
    z = tl.where(cols == (tl.load(labels + row) - first).to(tl.int32), float("-inf"), z)
    largest, old = tl.max(z, 0), tl.load(state)
    rest = 0.0
    if FRESH:
        top = tl.where(largest > old, largest, old)
    else:
        top = tl.where(largest > old + RISE, largest, old)
        rest += tl.load(state + rows)
        if largest > old + RISE:
            factor = tl.exp(old - largest)
            rest *= factor
            if total is not None:
                for start in range(0, d, TOTAL_BLOCK):
                    cols_of_total = start + tl.arange(0, TOTAL_BLOCK)
                    at = total + row.to(tl.int64) * d + cols_of_total
                    tl.store(at, tl.load(at, mask=cols_of_total < d) * factor, mask=cols_of_total < d)
    e = tl.exp(z - tl.where(top == float("-inf"), 0.0, top))  # so far all words are switched off
    rest += tl.sum(e, 0)  # a barrier: no warp still reads the state that is written now
    tl.store(state, top)
    tl.store(state + rows, rest)
    if total is not None:
        if WHOLE:
            tl.store(logits + cols, e.to(logits.dtype.element_ty))
        else:
            tl.store(logits + cols, e.to(logits.dtype.element_ty), mask=cols < words)


@triton.jit
def _end_kernel(
    losses, out, weight, labels, state, total, word_sum, dlosses, label_weight, other_weight, word_weight,
    rows, words, d, word_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    state += row
    top, rest = tl.load(state), tl.load(state + rows)
    label = tl.load(state + 2 * rows) - top
    both = rest + tl.exp(label)
    loss = tl.log(both) - label_weight * label
    if word_sum is not None:
        loss -= word_weight * (tl.load(state + 3 * rows) - words * top)
    tl.store(losses + row, loss)
    if out is not None:
        share = 1.0
        if dlosses is not None:
            share = tl.load(dlosses + row)
        factor = other_weight - rest / both  # p_y - a, without the difference of two numbers near 1
        weight += tl.load(labels + row) * word_stride
        for first in range(0, d, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            at = row.to(tl.int64) * d + cols
            dh = tl.load(total + at, mask=cols < d, other=0.0) / both
            dh += factor * tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)
            if word_sum is not None:
                dh -= word_weight * tl.load(word_sum + cols, mask=cols < d, other=0.0)
            tl.store(out + at, (dh * share).to(out.dtype.element_ty), mask=cols < d)
