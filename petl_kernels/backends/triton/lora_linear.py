"""lora_linear in Triton, for a group of linears that share one input.

    y_g = x W_gᵀ + c_g + scale_g s_g B_gᵀ,    s = drop(x) [A_1; …; A_G]ᵀ

The library makes the products with W, which it adds to the rank part. Forward has one launch for the whole group: s and
then c_g + scale_g s_g B_gᵀ as y_g, from one read of x; and y_g += x W_gᵀ. Backward has three launches: ds and then
drop'(ds A) as dx, from one read of dy; the parts of the sums over tokens dB and dA; and the sums of these parts. The
library adds dy_g W_g to dx. With t tokens, width d and total rank R, each launch moves 4td bytes (16-bit) for 4tdR
operations, so it is bound by memory below R of about 200 on an H200; the products read y and dx once more.

Where the ranks are too many for one program (FUSED_RANKS), s and ds have a launch of their own, and the library makes
the rank part. A quantized W takes its product from ``quantized_project`` and the rank part from plain products.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from petl_kernels.backends.products import PyTorchProducts
from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import (
    aligned,
    as_rows,
    drop,
    dropout_arguments,
    launch,
    load,
    load_rows,
    pick,
    stacked_rows,
    start_of,
    store,
    sum_partials,
    total_size,
)
from petl_kernels.backends.triton.dropout_add import dropout_add_backward
from petl_kernels.backends.triton.quantized import quantized_project, quantized_project_back
from petl_kernels.backends.triton.registry import serves
from petl_kernels.ops.quantized import is_quantized, split_parts

FUSED_RANKS = 64  # in all, for a program that holds s or ds of a block of tokens


@serves
def lora_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scales: list[float],
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = as_rows(x)
    ranks = [m.shape[0] for m in a]
    s = x.new_empty(rows.shape[0], sum(ranks))
    parts = split_parts(weights)
    ys = [x.new_empty(*x.shape[:-1], b_g.shape[0]) for b_g in b]
    for own in _launches(len(parts)) if rows.shape[0] else ():
        outputs = _quantized_outputs if any(map(is_quantized, parts[own])) else _outputs
        layers = parts[own], biases[own], a[own], b[own], scales[own]
        outputs(ys[own], rows, _columns(s, ranks, own), *layers, dropout, seed)
    return ys, s


@serves
def lora_linear_backward(
    dys: list[torch.Tensor],
    x: torch.Tensor,
    s: torch.Tensor,
    weights: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scales: list[float],
    dropout: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_dbias: list[bool],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    rows = as_rows(x)
    dys = [as_rows(dy) for dy in dys]
    ranks = [m.shape[0] for m in a]
    new = torch.Tensor.new_empty if rows.shape[0] else torch.Tensor.new_zeros
    da, db = [new(m, m.shape) for m in a], [new(m, m.shape) for m in b]
    parts = split_parts(weights)
    bias_sizes = [b_g.shape[0] if need else 0 for b_g, need in zip(b, need_dbias, strict=True)]
    dbias = [new(x, size, dtype=torch.float32) for size in bias_sizes]
    dx = rows.new_empty(rows.shape if need_dx else 0)
    for own in _launches(len(parts)) if rows.shape[0] else ():
        own_s, own_dys, mask = _columns(s, ranks, own), dys[own], (dropout, seed)
        rank_dx = dx if need_dx else None
        ds = _rank_part_of_gradients(rank_dx, own_dys, own_s, a[own], b[own], scales[own], *mask, add=own.start > 0)
        if need_dx:
            _add_products(dx, own_dys, parts[own])
        _adapter_gradients(da[own], db[own], dbias[own], own_dys, rows, own_s, ds, scales[own], *mask)
    return dx.view(x.shape if need_dx else (0,)), da, db, dbias


def _launches(groups: int) -> list[slice]:
    """Returns the linears of each launch, MAX_GROUPS at most."""
    return [slice(i, min(i + config.MAX_GROUPS, groups)) for i in range(0, groups, config.MAX_GROUPS)]


def _columns(s: torch.Tensor, ranks: list[int], own: slice) -> torch.Tensor:
    """Returns the columns of s that belong to the linears of one launch."""
    if own.start == 0 and own.stop == len(ranks):
        return s
    return s.narrow(1, sum(ranks[: own.start]), sum(ranks[own]))


def _same_dtype(matrices: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Returns the adapters of one launch in one dtype, since it reads them through one pointer type."""
    dtypes = {m.dtype for m in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return tuple([m.contiguous() if m.dtype == dtype else m.to(dtype).contiguous() for m in matrices])


def _project(s, x, a, dropout, seed) -> None:
    rows, inner = x.shape
    ranks = tuple(m.shape[0] for m in a)
    tile = config.SKINNY[config.key(x)]
    block = config.padded(sum(ranks), tile.n)
    seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
    warps = 8 if dropout or block > 32 else tile.warps
    grid = (config.cdiv(rows, tile.m), config.cdiv(sum(ranks), block))
    launch(
        _project_kernel, grid, s, x, a, seed, rows, inner, ranks, s.stride(0), x.stride(0), threshold, keep_scale,
        **constants, BM=tile.m, BK=tile.k, BR=block, warps=warps, stages=tile.stages,
    )  # fmt: skip


def _outputs(ys, x, s, weights, biases, a, b, scales, dropout, seed) -> None:
    a, b, rows = _same_dtype(a), _same_dtype(b), [as_rows(y) for y in ys]
    if s.shape[1] <= FUSED_RANKS:
        _rank_outputs(rows, x, s, biases, a, b, scales, dropout, seed)
    else:
        _project(s, x, a, dropout, seed)
        factors = s.split([b_g.shape[1] for b_g in b], 1)
        for y, s_g, bias, b_g, scale in zip(rows, factors, biases, b, scales, strict=True):
            right = (scale * b_g).to(s.dtype).t()
            torch.mm(s_g, right, out=y) if bias is None else torch.addmm(bias, s_g, right, out=y)
    for y, (weight,) in zip(rows, weights, strict=True):
        y.addmm_(x, weight.t())


def _quantized_outputs(ys, x, s, weights, biases, a, b, scales, dropout, seed) -> None:
    _project(s, x, _same_dtype(a), dropout, seed)
    factors = s.split([b_g.shape[1] for b_g in b], 1)
    for y, weight, bias, s_g, b_g, scale in zip(ys, weights, biases, factors, b, scales, strict=True):
        product = quantized_project if is_quantized(weight) else _dense_product
        product(x, weight, bias, as_rows(y)).addmm_(s_g, b_g.to(s.dtype).t(), alpha=scale)


def _dense_product(x, weight, bias, y) -> torch.Tensor:
    return PyTorchProducts.linear(x, weight[0], bias, y)


def _rank_outputs(ys, x, s, biases, a, b, scales, dropout, seed) -> None:
    """Writes s, and c_g + scale_g s_g B_gᵀ into y_g."""
    rows, inner = x.shape
    tile = config.SKINNY[config.key(x)]
    seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
    block = config.padded(s.shape[1], FUSED_RANKS)
    nothing = x.new_empty(0)
    biases = tuple(nothing if c is None else c for c in biases)
    launch(
        _rank_outputs_kernel, (config.cdiv(rows, tile.m),), s, tuple(ys), x, a, b, tuple(map(float, scales)), biases,
        tuple(c.numel() for c in biases), seed, rows, inner, tuple(y.shape[1] for y in ys),
        tuple(m.shape[0] for m in a), s.stride(0), x.stride(0), threshold, keep_scale, **constants,
        BM=tile.m, BK=tile.k, BN=config.rank_columns(x, 0.0), BR=block,
        warps=8 if dropout or block > 32 else tile.warps, stages=tile.stages,
    )  # fmt: skip


def _rank_part_of_gradients(dx, dys, s, a, b, scales, dropout, seed, add: bool) -> torch.Tensor:
    """Returns ds, and writes drop'(ds A) into dx, or adds it there; dx may be None."""
    a, b = _same_dtype(a), _same_dtype(b)
    if dx is None or s.shape[1] > FUSED_RANKS:
        ds = _rank_gradients(dys, b, scales, s)
        if dx is not None:
            through = ds @ torch.cat(a).to(ds.dtype)
            through = dropout_add_backward(through, ds.dtype, dropout, seed) if dropout else through
            dx.add_(through) if add else dx.copy_(through)
        return ds
    ds = s.new_empty(s.shape)
    rows, inner = dx.shape
    tile = config.SKINNY[config.key(s)]
    seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
    block = config.padded(s.shape[1], FUSED_RANKS)
    launch(
        _rank_input_kernel, (config.cdiv(rows, tile.m),), ds, dx, tuple(dys), a, b, tuple(map(float, scales)), seed,
        rows, inner, tuple(m.shape[0] for m in b), tuple(m.shape[0] for m in a), ds.stride(0),
        tuple(dy.stride(0) for dy in dys), threshold, keep_scale, **constants, ADD=add,
        BM=tile.m, BK=tile.k, BN=config.rank_columns(s, dropout), BR=block,
        warps=8 if dropout or block > 32 else tile.warps, stages=tile.stages,
    )  # fmt: skip
    return ds


def _add_products(dx, dys, weights) -> None:
    """Adds Σ_g dy_g W_g to dx."""
    for dy, weight in zip(dys, weights, strict=True):
        if is_quantized(weight):
            dx.add_(quantized_project_back(dy, weight))
        else:
            dx.addmm_(dy, weight[0])


def _rank_gradients(dys, b, scales, s) -> torch.Tensor:
    """Returns ds (tokens, Σr) with ds_g = scale_g dy_g B_g."""
    ds = s.new_empty(s.shape)
    ranks = tuple(m.shape[1] for m in b)
    tile = config.SKINNY[config.key(s)]
    block = config.padded(max(ranks), tile.n)
    grid = (config.cdiv(s.shape[0], tile.m), config.cdiv(max(ranks), block), len(dys))
    launch(
        _rank_gradients_kernel, grid, ds, tuple(dys), b, tuple(map(float, scales)), s.shape[0],
        tuple(m.shape[0] for m in b), ranks, ds.stride(0), tuple(dy.stride(0) for dy in dys),
        ALIGN=config.alignment(ranks), BM=tile.m, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return ds


def _adapter_gradients(da, db, dbias, dys, x, s, ds, scales, dropout, seed) -> None:
    rows, inner = x.shape
    ranks, sizes = tuple(m.shape[0] for m in da), tuple(m.shape[0] for m in db)
    tile = config.TOKEN_SUM[config.key(x)]
    with_bias = any(g.numel() for g in dbias)
    # Where one bias gradient is needed all are summed, and the others are dropped.
    outs = [*db, *da, *(g if g.numel() else x.new_empty(n) for g, n in zip(dbias, sizes, strict=True) if with_bias)]
    ends = list(accumulate((out.numel() for out in outs), initial=0))

    a_block, b_block = config.padded(sum(ranks), tile.n), config.padded(max(ranks), tile.n)
    a_grid = (config.cdiv(inner, tile.m), config.cdiv(sum(ranks), a_block))
    b_grid = (config.cdiv(max(sizes), tile.m), config.cdiv(max(ranks), b_block) * len(sizes))
    programs = a_grid[0] * a_grid[1] + b_grid[0] * b_grid[1]
    splits = config.splits(x, tile, programs)
    partials = x.new_empty(splits, ends[-1], dtype=torch.float32)
    seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
    launch(
        _adapter_gradients_kernel, (programs, splits), partials, tuple(dys), x, s, ds, seed, tuple(map(float, scales)),
        rows, inner, sizes, ranks, tuple(dy.stride(0) for dy in dys), x.stride(0), s.stride(0), ds.stride(0), ends[-1],
        ends[len(sizes)], ends[2 * len(sizes)], b_grid[0], b_grid[1], a_grid[0], threshold, keep_scale,
        **constants, BIAS=with_bias, ALIGN=config.alignment((*ranks, s.stride(0), ds.stride(0))), BM=tile.k, BN=tile.m,
        BR_A=a_block, BR_B=b_block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    sum_partials(partials, outs)


@triton.jit(do_not_specialize=["threshold"])
def _project_kernel(
    s, x, a, seed, M, K, ranks, stride_s, stride_x, threshold, keep_scale,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes s = drop(x) [A_1; …; A_G]ᵀ: one read of x for the whole group."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < total_size(ranks)
    a_rows = stacked_rows(a, ranks, rank, K)[None, :]

    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tile = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < K)
        if DROPOUT:
            tile = drop(tile, seed, rows, start, K, threshold, keep_scale)
        factor = load(a_rows + k[:, None], k < K, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
    store(s + rows[:, None] * stride_s + rank[None, :], acc, row_inside, rank_inside)


@triton.jit(do_not_specialize=["threshold"])
def _rank_outputs_kernel(
    s, ys, x, a, b, scales, biases, bias_sizes, seed, M, K, sizes, ranks, stride_s, stride_x, threshold, keep_scale,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes s of a block of tokens like ``_project_kernel``, and from it y_g = c_g + scale_g s_g B_gᵀ by columns."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < total_size(ranks)
    a_rows = stacked_rows(a, ranks, rank, K)[None, :]

    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tile = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < K)
        if DROPOUT:
            tile = drop(tile, seed, rows, start, K, threshold, keep_scale)
        factor = load(a_rows + k[:, None], k < K, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
    left = acc.to(s.dtype.element_ty)
    tl.store(s + rows[:, None] * stride_s + rank[None, :], left, mask=row_inside[:, None] & rank_inside[None, :])

    first = 0
    for g in tl.static_range(len(sizes)):
        own = (rank >= first) & (rank < first + ranks[g])
        for start in tl.range(0, sizes[g], BN, num_stages=1):
            cols = start + tl.arange(0, BN)
            right = load(b[g] + cols[None, :] * ranks[g] + (rank - first)[:, None], own, cols < sizes[g])
            out = tl.dot(left, right.to(left.dtype), input_precision="ieee") * scales[g]
            out += tl.load(biases[g] + cols, mask=cols < bias_sizes[g], other=0.0).to(tl.float32)[None, :]
            store(ys[g] + rows[:, None] * sizes[g] + cols[None, :], out, row_inside, cols < sizes[g])
        first += ranks[g]


@triton.jit
def _rank_gradients_kernel(
    ds, dys, b, scales, M, sizes, ranks, stride_ds, strides_dy,
    ALIGN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes ds_g = scale_g dy_g B_g."""
    g = tl.program_id(2)
    N, dy, b_g, stride_dy = pick(sizes, g), pick(dys, g), pick(b, g), pick(strides_dy, g)
    R, stride_ds = aligned(pick(ranks, g), ALIGN), aligned(stride_ds, ALIGN)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < R

    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, N, BK):
        n = start + tl.arange(0, BK)
        tile = load(dy + rows[:, None] * stride_dy + n[None, :], row_inside, n < N)
        factor = load(b_g + n[:, None] * R + rank[None, :], n < N, rank_inside)
        acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
    out = ds + aligned(start_of(ranks, g), ALIGN) + rows[:, None] * stride_ds + rank[None, :]
    store(out, acc * pick(scales, g), row_inside, rank_inside)


@triton.jit(do_not_specialize=["threshold"])
def _rank_input_kernel(
    ds, dx, dys, a, b, scales, seed, M, K, sizes, ranks, stride_ds, strides_dy, threshold, keep_scale,
    DROPOUT: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes ds of a block of tokens, all groups side by side, and from it dx = drop'(ds A) by columns."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.arange(0, BR)
    row_inside, rank_inside = rows < M, rank < total_size(ranks)

    acc = tl.zeros((BM, BR), tl.float32)
    factors = tl.zeros((BR,), tl.float32)
    first = 0
    for g in tl.static_range(len(sizes)):
        own = (rank >= first) & (rank < first + ranks[g])
        factors = tl.where(own, scales[g], factors)
        for start in range(0, sizes[g], BK):
            n = start + tl.arange(0, BK)
            tile = load(dys[g] + rows[:, None] * strides_dy[g] + n[None, :], row_inside, n < sizes[g])
            factor = load(b[g] + n[:, None] * ranks[g] + (rank - first)[None, :], n < sizes[g], own)
            acc = tl.dot(tile, factor.to(tile.dtype), acc, input_precision="ieee")
        first += ranks[g]
    left = (acc * factors[None, :]).to(ds.dtype.element_ty)
    tl.store(ds + rows[:, None] * stride_ds + rank[None, :], left, mask=row_inside[:, None] & rank_inside[None, :])

    a_rows = stacked_rows(a, ranks, rank, K)[:, None]
    for start in tl.range(0, K, BN, num_stages=1):
        cols = start + tl.arange(0, BN)
        right = load(a_rows + cols[None, :], rank_inside, cols < K)
        out = tl.dot(left, right.to(left.dtype), input_precision="ieee")
        if DROPOUT:
            out = drop(out, seed, rows, start, K, threshold, keep_scale)
        pointers = dx + rows[:, None] * K + cols[None, :]
        if ADD:
            out += load(pointers, row_inside, cols < K).to(tl.float32)
        store(pointers, out, row_inside, cols < K)


@triton.jit(do_not_specialize=["threshold"])
def _adapter_gradients_kernel(
    partials, dys, x, s, ds, seed, scales, M, K, sizes, ranks, strides_dy, stride_x, stride_s, stride_ds, total,
    a_start, bias_start, b_tiles, b_chunks, a_tiles, threshold, keep_scale,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR_A: tl.constexpr, BR_B: tl.constexpr,
):  # fmt: skip
    """Writes this split's part of every dB_g, or of every dA_g: both stand side by side in one grid."""
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    stop = min((split + 1) * length, M)
    out = partials + split.to(tl.int64) * total
    if pid < b_tiles * b_chunks:
        _b_gradients(
            out, dys, s, scales, split * length, stop, sizes, ranks, strides_dy, stride_s, bias_start, pid % b_tiles,
            pid // b_tiles, BIAS, ALIGN, BM, BN, BR_B,
        )  # fmt: skip
    else:
        tile = pid - b_tiles * b_chunks
        _a_gradients(
            out + a_start, x, ds, seed, split * length, stop, K, total_size(ranks), stride_x, stride_ds, threshold,
            keep_scale, tile % a_tiles, tile // a_tiles, DROPOUT, ALIGN, BM, BN, BR_A,
        )  # fmt: skip


@triton.jit
def _b_gradients(
    out, dys, s, scales, begin, stop, sizes, ranks, strides_dy, stride_s, bias_start, tile_n, chunk,
    BIAS: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Adds up over rows [begin, stop): dB_g = scale_g dy_gᵀ s_g, and dbias_g = Σ dy_g."""
    g, chunk = chunk % len(sizes), chunk // len(sizes)
    N, dy, stride_dy = pick(sizes, g), pick(dys, g), pick(strides_dy, g)
    R, stride_s = aligned(pick(ranks, g), ALIGN), aligned(stride_s, ALIGN)
    cols = tile_n * BN + tl.arange(0, BN)
    rank = chunk * BR + tl.arange(0, BR)
    col_inside, rank_inside = cols < N, rank < R
    s_g = s + aligned(start_of(ranks, g), ALIGN)

    acc = tl.zeros((BN, BR), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    if BIAS:  # from a load that feeds no product (common.py), and of no rows where the sums are not stored
        sum_stop = tl.where(chunk == 0, stop, 0)
        ahead = load_rows(dy, stride_dy, begin, sum_stop, cols, col_inside, BM)
    for start in range(begin, stop, BM):
        tile = load_rows(dy, stride_dy, start, stop, cols, col_inside, BM)
        right = load_rows(s_g, stride_s, start, stop, rank, rank_inside, BM)
        if BIAS:
            sums += tl.sum(ahead.to(tl.float32), 0)
            ahead = load_rows(dy, stride_dy, start + BM, sum_stop, cols, col_inside, BM)
        acc = tl.dot(tl.trans(tile), right, acc, input_precision="ieee")

    before = 0
    for i in tl.static_range(len(sizes) - 1):
        before = tl.where(g > i, before + sizes[i] * ranks[i], before)
    block = out + before + cols[:, None] * R + rank[None, :]
    store(block, acc * pick(scales, g), col_inside, rank_inside)
    if BIAS:
        if chunk == 0:
            tl.store(out + bias_start + start_of(sizes, g) + cols, sums, mask=col_inside)


@triton.jit
def _a_gradients(
    out, x, ds, seed, begin, stop, K, R, stride_x, stride_ds, threshold, keep_scale, tile_n, chunk,
    DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes [dA_1; …; dA_G] = dsᵀ drop(x) of rows [begin, stop): x is read once for the whole group."""
    R, stride_ds = aligned(R, ALIGN), aligned(stride_ds, ALIGN)
    cols = tile_n * BN + tl.arange(0, BN)
    rank = chunk * BR + tl.arange(0, BR)

    acc = tl.zeros((BN, BR), tl.float32)
    for start in range(begin, stop, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        inside = rows < stop
        tile = load(x + rows[:, None] * stride_x + cols[None, :], inside, cols < K)
        if DROPOUT:
            tile = drop(tile, seed, rows, tile_n * BN, K, threshold, keep_scale)
        right = load(ds + rows[:, None] * stride_ds + rank[None, :], inside, rank < R)
        acc = tl.dot(tl.trans(tile), right, acc, input_precision="ieee")
    store(out + rank[None, :] * K + cols[:, None], acc, cols < K, rank < R)
