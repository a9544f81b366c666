"""lora_border in Triton: the two products are the library's, and the skinny passes beside them are here.

    forward     one launch: s = x Aᵀ, written behind x and once more alone; S and c into the border. Then the product.
    backward    one launch: ds = dy S behind dy and the parts of dB and dc, from one read of dy; A into the border.
                A program walks over blocks of tokens and adds to its part, of which there are at most 64.
                Then dA = dsᵀ x, the sums of the parts, and the product.

With t tokens, K inputs and N_g outputs of those with an adapter, in 16 bit: s moves 2tK bytes, ds and dB 2t Σ N_g and
8 Σ N_g r_g for every block of tokens, dA 2tK. The same launch has programs that write the border.
"""

# A type checker cannot follow ``@triton.jit``: to it, kernels and ``tl.range`` never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import (
    aligned,
    launch,
    load,
    pick,
    stacked_rows,
    start_of,
    store,
    sum_partials,
    total_size,
)
from petl_kernels.backends.triton.frozen_linear import column_sums
from petl_kernels.backends.triton.lora_linear import _a_gradients, _same_dtype
from petl_kernels.backends.triton.registry import serves

BORDER_ROWS = 64  # of S that one program writes
BORDER_COLUMNS = 64  # of S and rows of A that it writes at a time: as many as its registers take


@serves
def lora_border(wide, border, bias, biases, a, b, scales) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and s as ``ops.lora_border`` does, for at most MAX_GROUPS linears."""
    k, sizes, ranks = _sizes(a, b)
    outputs, room = sum(sizes), wide.shape[1] - k
    s = wide.new_empty(wide.shape[0], sum(ranks))
    if room or bias is not None:
        _write_inputs(s, wide, border, bias, biases, _same_dtype(a), _same_dtype(b), scales)
    right = border[:outputs].t()
    return wide @ right if bias is None else torch.addmm(bias, wide, right), s


@serves
def lora_border_backward(wide, x, s, border, a, b, scales, need_dx, need_dbias):
    k, sizes, ranks = _sizes(a, b)
    new = torch.Tensor.new_empty if wide.shape[0] else torch.Tensor.new_zeros
    da, db = [new(m, m.shape) for m in a], [new(m, m.shape) for m in b]
    dbias = [new(wide, n if need else 0, dtype=torch.float32) for n, need in zip(sizes, need_dbias, strict=True)]
    if sum(ranks):
        _write_gradients(db, dbias, wide, s, border, _same_dtype(a), _same_dtype(b), scales)
        if wide.shape[0]:
            _sum_over_tokens(da, x, wide[:, sum(sizes) :])
    elif any(need_dbias):
        sums = column_sums(wide).split(sizes)
        dbias = [own if need else grad for own, grad, need in zip(sums, dbias, need_dbias, strict=True)]
    return wide @ border[:, :k] if need_dx else wide.new_empty(0), da, db, dbias


def _sizes(a, b) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Returns (inputs, outputs of each linear, rank of each linear)."""
    assert len(a) <= config.MAX_GROUPS
    return a[0].shape[1], tuple(m.shape[0] for m in b), tuple(m.shape[0] for m in a)


def _write_inputs(s, wide, border, bias, biases, a, b, scales) -> None:
    k, sizes, ranks = _sizes(a, b)
    rows, room = wide.shape[0], wide.shape[1] - k
    tile = config.SKINNY[config.key(wide)]
    block = config.padded(max(1, room), tile.n)
    chunks = config.cdiv(room, block)
    programs = config.cdiv(rows, tile.m) * chunks
    places = config.cdiv(sum(sizes), BORDER_ROWS)
    launch(
        _inputs_kernel, (programs + places,), s, wide, border, bias, tuple(biases), tuple(c.numel() for c in biases),
        a, b, tuple(map(float, scales)), rows, k, room, sizes, ranks, programs, max(1, chunks),
        s.stride(0), wide.stride(0), border.stride(0), BM=tile.m, BK=tile.k, BR=block, BN=BORDER_ROWS,
        BW=config.padded(max(1, room), BORDER_COLUMNS), warps=8 if block > 32 else tile.warps, stages=tile.stages,
    )  # fmt: skip


def _write_gradients(db, dbias, wide, s, border, a, b, scales) -> None:
    """Writes ds behind dy and A into the border, and adds up dB and, where one is wanted, dc."""
    k, sizes, ranks = _sizes(a, b)
    rows, room = wide.shape[0], wide.shape[1] - sum(sizes)
    with_bias = any(g.numel() for g in dbias)
    tile = config.GRADIENTS[config.key(wide)]
    block = config.padded(max(ranks), config.SKINNY[config.key(wide)].n)
    if block > 16 and tile.m == 128:
        tile = tile._replace(k=32, warps=8)  # the part of dB takes registers
    chunks, row_blocks = config.cdiv(max(ranks), block), config.cdiv(rows, tile.m)
    parts = config.gradient_parts(wide, row_blocks)
    programs, places = parts * chunks * len(sizes), config.cdiv(k, tile.k)
    # Where one bias gradient is needed all are summed, and the others are dropped.
    sums = [g if g.numel() else wide.new_empty(n, dtype=torch.float32) for g, n in zip(dbias, sizes, strict=True)]
    outs = [*db, *(sums if with_bias else ())]
    ends = list(accumulate((out.numel() for out in outs), initial=0))
    partials = wide.new_empty(parts, ends[-1], dtype=torch.float32)
    launch(
        _gradients_kernel, (programs + places,), partials, wide, s, border, a, b, tuple(map(float, scales)),
        rows, k, room, sizes, ranks, programs, chunks, parts, wide.stride(0), s.stride(0), border.stride(0), ends[-1],
        ends[len(sizes)], BIAS=with_bias, ALIGN=config.alignment((*ranks, s.stride(0))), BM=tile.m, BK=tile.k,
        BR=block, BW=config.padded(max(1, room), BORDER_COLUMNS), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if rows:
        sum_partials(partials, outs)


def _sum_over_tokens(da, x, ds) -> None:
    """Writes dA = dsᵀ x, without the columns of ds beyond the ranks."""
    rows, inner = x.shape
    ranks, tile = sum(m.shape[0] for m in da), config.TOKEN_SUM[config.key(x)]
    block = config.padded(ranks, tile.n)
    tiles, chunks = config.cdiv(inner, tile.m), config.cdiv(ranks, block)
    splits = config.splits(x, tile, tiles * chunks)
    partials = x.new_empty(splits, ranks * inner, dtype=torch.float32)
    launch(
        _token_sum_kernel, (tiles * chunks, splits), partials, x, ds, rows, inner, ranks, x.stride(0), ds.stride(0),
        tiles, ALIGN=config.alignment((ranks, ds.stride(0))), BM=tile.k, BN=tile.m, BR=block, warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
    sum_partials(partials, da)


@triton.jit
def _inputs_kernel(
    s, wide, border, bias, biases, bias_sizes, a, b, scales, M, K, room, sizes, ranks, programs, chunks,
    stride_s, stride_wide, stride_border,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Writes s of a block of tokens, or some rows of S and c."""
    pid = tl.program_id(0)
    if pid < programs:
        _project_rows(
            s, wide, a, (pid // chunks) * BM, (pid % chunks) * BR, M, K, room, ranks, stride_s, stride_wide, BM, BK, BR
        )
    else:
        rows = (pid - programs) * BN + tl.arange(0, BN)
        out = border + rows.to(tl.int64)[:, None] * stride_border + K
        for start in tl.range(0, room, BW, num_stages=1):
            cols = start + tl.arange(0, BW)
            values = tl.zeros((BN, BW), tl.float32)
            first, column = 0, 0
            for i in tl.static_range(len(sizes)):
                n, rank = rows - first, cols - column
                inside, own = (n >= 0) & (n < sizes[i]), (rank >= 0) & (rank < ranks[i])
                values += load(b[i] + n[:, None] * ranks[i] + rank[None, :], inside, own).to(tl.float32) * scales[i]
                first, column = first + sizes[i], column + ranks[i]
            store(out + cols[None, :], values, rows < first, cols < room)
        if bias is not None:
            total = tl.zeros((BN,), tl.float32)
            first = 0
            for i in tl.static_range(len(sizes)):
                n = rows - first
                total += tl.load(biases[i] + n, mask=(n >= 0) & (n < bias_sizes[i]), other=0.0).to(tl.float32)
                first += sizes[i]
            tl.store(bias + rows, total.to(bias.dtype.element_ty), mask=rows < first)


@triton.jit
def _project_rows(
    s, wide, a, row, first, M, K, room, ranks, stride_s, stride_wide,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes s of rows from `row` on, columns from `first` on: behind x, with zeros beyond the ranks, and alone."""
    rows = (row + tl.arange(0, BM)).to(tl.int64)
    rank = first + tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < total_size(ranks)
    a_rows = stacked_rows(a, ranks, rank, K)[None, :]
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tile = load(wide + rows[:, None] * stride_wide + k[None, :], row_inside, k < K)
        factor = load(a_rows + k[:, None], k < K, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
    store(wide + rows[:, None] * stride_wide + K + rank[None, :], acc, row_inside, rank < room)
    store(s + rows[:, None] * stride_s + rank[None, :], acc, row_inside, rank_inside)


@triton.jit
def _gradients_kernel(
    partials, wide, s, border, a, b, scales, M, K, room, sizes, ranks, programs, chunks, parts, stride_wide, stride_s,
    stride_border, total, bias_start,
    BIAS: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Writes ds_g = scale_g dy_g B_g of every `parts`-th block of tokens, or a piece of A.

    With ds_g go the blocks' parts of dB_g = scale_g dy_gᵀ s_g and of Σ dy_g.
    """
    pid = tl.program_id(0)
    if pid < programs:
        g, chunk = pid % len(sizes), (pid // len(sizes)) % chunks
        part = pid // len(sizes) // chunks
        out = partials + part.to(tl.int64) * total
        for block in tl.range(part, tl.cdiv(M, BM), parts, num_stages=1):
            _gradient_rows(
                out, wide, s, b, scales, block, block >= parts, g, chunk, chunks, M, room, sizes, ranks, stride_wide,
                stride_s, bias_start, BIAS, ALIGN, BM, BK, BR,
            )  # fmt: skip
            tl.debug_barrier()  # a thread may read what another has added to the part
    else:
        k = (pid - programs) * BK + tl.arange(0, BK)
        for start in tl.range(0, room, BW, num_stages=1):
            rank = start + tl.arange(0, BW)
            values = load(stacked_rows(a, ranks, rank, K)[:, None] + k[None, :], rank < total_size(ranks), k < K)
            out = border + (total_size(sizes) + rank).to(tl.int64)[:, None] * stride_border + k[None, :]
            store(out, values, rank < room, k < K)


@triton.jit
def _gradient_rows(
    out, wide, s, b, scales, block, add, g, chunk, chunks, M, room, sizes, ranks, stride_wide, stride_s, bias_start,
    BIAS: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    N, b_g, scale = pick(sizes, g), pick(b, g), pick(scales, g)
    R, stride_s = aligned(pick(ranks, g), ALIGN), aligned(stride_s, ALIGN)
    column = aligned(start_of(ranks, g), ALIGN)
    dy, ds = wide + start_of(sizes, g), wide + total_size(sizes)
    rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
    rank = chunk * BR + tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < R
    before = 0
    for i in tl.static_range(len(sizes) - 1):
        before = tl.where(g > i, before + sizes[i] * ranks[i], before)

    s_block = load(s + column + rows[:, None] * stride_s + rank[None, :], row_inside, rank_inside)
    acc = tl.zeros((BM, BR), tl.float32)
    stop = N
    if BIAS:  # from a load that feeds no product (common.py)
        ahead = load(dy + rows[:, None] * stride_wide + tl.arange(0, BK)[None, :], row_inside, tl.arange(0, BK) < N)
    else:
        stop = tl.where(R > 0, N, 0)
    for start in range(0, stop, BK):
        n = start + tl.arange(0, BK)
        tile = load(dy + rows[:, None] * stride_wide + n[None, :], row_inside, n < N)
        factor = load(b_g + n[:, None] * R + rank[None, :], n < N, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
        part = tl.dot(tl.trans(tile), s_block, input_precision="ieee")
        place = out + before + n[:, None] * R + rank[None, :]
        store(place, part * scale + load(place, add & (n < N), rank_inside), n < N, rank_inside)
        if BIAS:
            if chunk == 0:
                sums = out + bias_start + start_of(sizes, g) + n
                so_far = tl.load(sums, mask=add & (n < N), other=0.0)
                tl.store(sums, so_far + tl.sum(ahead.to(tl.float32), 0), mask=n < N)
            n += BK
            ahead = load(dy + rows[:, None] * stride_wide + n[None, :], row_inside, n < N)
    store(ds + column + rows[:, None] * stride_wide + rank[None, :], acc * scale, row_inside, rank_inside)
    if (g == len(sizes) - 1) & (chunk == chunks - 1):
        rest = total_size(ranks) + tl.arange(0, 16)
        store(ds + rows[:, None] * stride_wide + rest[None, :], tl.zeros((BM, 16), tl.float32), row_inside, rest < room)


@triton.jit
def _token_sum_kernel(
    partials, x, ds, M, K, R, stride_x, stride_ds, tiles,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes this split's part of [dA_1; …; dA_G]."""
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    _a_gradients(
        partials + split.to(tl.int64) * K * R, x, ds, None, split * length, min((split + 1) * length, M), K, R,
        stride_x, stride_ds, 0, 1.0, pid % tiles, pid // tiles, False, ALIGN, BM, BN, BR,
    )  # fmt: skip
