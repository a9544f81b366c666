"""The row pass of linear_cross_entropy in Triton: everything between the products, over one chunk of logits.

It serves ``ops/loss_by_rows.py``; the way by words is in loss_by_words.py here. A chunk has few rows of many
words, fewer rows than a card has multiprocessors. So a row is cut into blocks, and two kernels run over (rows, blocks):
the first finds each block's maximum, Σ exp and Σ z, the second adds up the blocks of its row, in order, and writes its
block of the gradient in place. In between, the chunk stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import launch
from petl_kernels.backends.triton.registry import serves
from petl_kernels.ops.product import ALIGNED


@serves
def linear_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    label_weight: float,
    word_weight: float,
    scale: float,
    dlosses: torch.Tensor | None,
    gradient: bool,
) -> torch.Tensor:
    rows, words = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    # With the padding between rows, which ends where no mask keeps loads and stores from being wide. It is overwritten.
    width = logits.stride(0) if 0 <= logits.stride(0) - words < ALIGNED else words
    block = config.vocabulary_block(logits)
    blocks = config.cdiv(width, block)
    sums = logits.new_empty(3, rows, blocks, dtype=torch.float32)
    label_logits = torch.empty_like(losses)
    layout = (words, width, logits.stride(0), blocks, rows * blocks)
    options = {"SMOOTH": word_weight != 0, "BLOCK": block, "warps": config.VOCABULARY_WARPS, "stages": 1}
    launch(_sums_kernel, (rows, blocks), sums, label_logits, logits, labels, bias, scale, *layout, **options)
    launch(
        _loss_kernel, (rows, blocks if gradient else 1), losses, sums, label_logits, logits, labels, bias, dlosses,
        label_weight, word_weight, scale, *layout,
        GRADIENT=gradient, BLOCKS=triton.next_power_of_2(blocks), **options,
    )  # fmt: skip
    return losses


@triton.jit
def _z(logits, cols, words, width, bias, scale):
    """Returns z of some words in fp32, and -inf in the padding."""
    z = tl.load(logits + cols, mask=cols < width, other=0.0).to(tl.float32) * scale
    if bias is not None:
        z += tl.load(bias + cols, mask=cols < words, other=0.0)
    return tl.where(cols < words, z, float("-inf"))


@triton.jit
def _sums_kernel(
    sums, label_logits, logits, labels, bias, scale, words, width, stride, blocks, plane,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(logits + row.to(tl.int64) * stride, cols, words, width, bias, scale)
    top = tl.max(z, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)  # a block of words that are all switched off
    sums += row * blocks + block
    tl.store(sums, top)
    tl.store(sums + plane, tl.sum(tl.exp(z - origin), 0))
    if SMOOTH:
        tl.store(sums + 2 * plane, tl.sum(tl.where(cols < words, z - origin, 0.0), 0))
    label = tl.load(labels + row)
    if label // BLOCK == block:
        tl.store(label_logits + row, tl.sum(tl.where(cols == label, z, 0.0), 0))


@triton.jit
def _loss_kernel(
    losses, sums, label_logits, logits, labels, bias, dlosses,
    label_weight, word_weight, scale, words, width, stride, blocks, plane,
    GRADIENT: tl.constexpr, BLOCKS: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, BLOCKS)
    mine = index < blocks
    sums += row * blocks + index
    tops = tl.load(sums, mask=mine, other=float("-inf"))
    top = tl.max(tops, 0)
    log_sum = tl.log(tl.sum(tl.exp(tops - top) * tl.load(sums + plane, mask=mine, other=0.0), 0))
    if block == 0:
        loss = log_sum - label_weight * (tl.load(label_logits + row) - top)
        if SMOOTH:
            counts = tl.minimum(words - index * BLOCK, BLOCK)
            sums_z = tl.load(sums + 2 * plane, mask=mine, other=0.0) + counts * (tops - top)
            loss -= word_weight * tl.sum(tl.where(mine, sums_z, 0.0), 0)
        tl.store(losses + row, loss)
    if GRADIENT:
        cols = block * BLOCK + tl.arange(0, BLOCK)
        logits += row.to(tl.int64) * stride
        dz = tl.exp(_z(logits, cols, words, width, bias, scale) - top - log_sum) - word_weight
        dz -= tl.where(cols == tl.load(labels + row), label_weight, 0.0)
        if dlosses is not None:
            dz *= tl.load(dlosses + row)
        tl.store(logits + cols, dz.to(logits.dtype.element_ty), mask=cols < width)
