"""ds, dB and the biases' sums from one read of dy; dA from one read of x.

s is known from the forward, so a program that holds a block of tokens reads dy once, column block by column block: each
adds to ds, which stays in registers, and gives this block's part of dB, which goes to memory. The parts weigh
4 · N · R bytes for every BM tokens: at BM = 128 and R = 16 half of what dy itself weighs in 16 bit, at R = 64 twice.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from frame import pair, shipped

from petl_kernels.backends.triton import common, config
from petl_kernels.backends.triton.common import aligned, load, pick, start_of, store

MAX_RANK = 64
# Tokens a program has, the columns of dy at a time.
TILES = {"interpreter": config.Tile(32, 0, 32, 4, 1), "fp32": config.Tile(32, 0, 32, 4, 2)}
TILE = config.Tile(128, 0, 64, 4, 3)


def _gradients(dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    ds = _dy_pass(db, dbias, dys, s, b, scales)
    shipped._input_gradient(dx, dys, ds, weights, a, 0.0, None, False)
    _x_pass(da, x, ds)


def _dy_pass(db, dbias, dys, s, b, scales) -> torch.Tensor:
    rows = s.shape[0]
    ranks, sizes = tuple(m.shape[1] for m in b), tuple(m.shape[0] for m in b)
    assert max(ranks) <= MAX_RANK
    with_bias = any(g.numel() for g in dbias)
    outs = [*db, *(g if g.numel() else s.new_empty(n) for g, n in zip(dbias, sizes, strict=True) if with_bias)]
    ends = list(accumulate((out.numel() for out in outs), initial=0))
    tile = TILES.get(config.key(s), TILE)
    block = config.padded(max(ranks), MAX_RANK)
    if block > 16 and tile is TILE:
        tile = tile._replace(k=32, warps=8)  # dB's part takes registers
    ds = s.new_empty(s.shape)
    blocks = triton.cdiv(rows, tile.m)
    partials = s.new_empty(blocks, ends[-1], dtype=torch.float32)
    common.launch(
        _dy_kernel, (blocks, len(sizes)), ds, partials, tuple(dys), s, b, tuple(map(float, scales)), rows, sizes, ranks,
        tuple(dy.stride(0) for dy in dys), s.stride(0), ends[-1], ends[len(sizes)], BIAS=with_bias,
        ALIGN=config.alignment((*ranks, s.stride(0))), BM=tile.m, BK=tile.k, BR=block,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    common.sum_partials(partials, outs)
    return ds


def _x_pass(da, x, ds) -> None:
    rows, inner = x.shape
    ranks = tuple(m.shape[0] for m in da)
    tile = config.TOKEN_SUM[config.key(x)]
    block = config.padded(sum(ranks), tile.n)
    grid = (triton.cdiv(inner, tile.m), triton.cdiv(sum(ranks), block))
    splits = config.splits(x, tile, grid[0] * grid[1])
    partials = x.new_empty(splits, sum(ranks) * inner, dtype=torch.float32)
    common.launch(
        _x_kernel, (*grid, splits), partials, x, ds, rows, inner, sum(ranks), x.stride(0), ds.stride(0),
        partials.shape[1], ALIGN=config.alignment(ranks), BM=tile.k, BN=tile.m, BR=block,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    common.sum_partials(partials, da)


@triton.jit
def _dy_kernel(
    ds, partials, dys, s, b, scales, M, sizes, ranks, strides_dy, stride_s, total, bias_start,
    BIAS: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """ds_g = scale_g dy_g B_g, and this block of tokens' part of dB_g = scale_g dy_gᵀ s_g and of Σ dy_g."""
    g = tl.program_id(1)
    N, dy, b_g, scale, stride_dy = pick(sizes, g), pick(dys, g), pick(b, g), pick(scales, g), pick(strides_dy, g)
    R, stride_s = aligned(pick(ranks, g), ALIGN), aligned(stride_s, ALIGN)
    column = aligned(start_of(ranks, g), ALIGN)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < R
    out = partials + tl.program_id(0).to(tl.int64) * total
    before = 0
    for i in tl.static_range(len(sizes) - 1):
        before = tl.where(g > i, before + sizes[i] * ranks[i], before)

    s_block = load(s + column + rows[:, None] * stride_s + rank[None, :], row_inside, rank_inside)
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, N, BK):
        n = start + tl.arange(0, BK)
        tile = load(dy + rows[:, None] * stride_dy + n[None, :], row_inside, n < N)
        factor = load(b_g + n[:, None] * R + rank[None, :], n < N, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
        part = tl.dot(tl.trans(tile), s_block, input_precision="ieee")
        store(out + before + n[:, None] * R + rank[None, :], part * scale, n < N, rank_inside)
        if BIAS:
            tl.store(out + bias_start + start_of(sizes, g) + n, tl.sum(tile.to(tl.float32), 0), mask=n < N)
    store(ds + column + rows[:, None] * stride_s + rank[None, :], acc * scale, row_inside, rank_inside)


@triton.jit
def _x_kernel(
    partials, x, ds, M, K, R, stride_x, stride_ds, total,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """This split's part of every dA_g."""
    split, splits = tl.program_id(2), tl.num_programs(2)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    shipped._a_gradients(
        partials + split.to(tl.int64) * total, x, ds, None, split * length, min((split + 1) * length, M), K, R,
        stride_x, stride_ds, 0, 1.0, tl.program_id(0), tl.program_id(1), False, False, ALIGN, BM, BN, BR,
    )  # fmt: skip


_functions = pair(gradients=_gradients)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
