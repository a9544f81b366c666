"""lora_linear in Triton, for a group of linears that share one input.

    y_g = x W_gᵀ + c_g + scale_g s_g B_gᵀ,    s = drop(x) [A_1; …; A_G]ᵀ

Forward, two launches: `s` for the whole group in one read of x, then every y_g in one grid whose accumulators start
from the rank part. Backward, four: ds, dx, and the sums over tokens dB, dA with one pass that adds their parts. With
t tokens, width d and total rank R, each skinny launch moves 2td bytes (16-bit) for 2tdR operations, so it is bound by
memory below R of about 200 on an H200; the rank parts of y and dx add R/d to the frozen product and no traffic of note.

A quantised W takes its product from ``quantised_project`` and the rank part from plain products.

ds is not fused into dx: each of dx's column tiles would form it again, at R/BN of the product (6 to 25%), to save one
read of dy that mostly hits the L2 cache.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

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
    swizzle,
    total_size,
)
from petl_kernels.ops import philox
from petl_kernels.ops.quantised import is_quantised, project, project_back, split_parts


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
    weights = split_parts(weights)
    ys = [x.new_empty(*x.shape[:-1], b_g.shape[0]) for b_g in b]
    if rows.shape[0]:
        for part in _parts(len(weights)):
            s_part = _columns(s, ranks, part)
            _project(s_part, rows, _same_dtype(a[part]), dropout, seed)
            if any(map(is_quantised, weights[part])):
                _quantised_outputs(ys[part], rows, s_part, weights[part], biases[part], b[part], scales[part])
            else:
                dense = [w for (w,) in weights[part]]
                _outputs(ys[part], rows, s_part, dense, biases[part], _same_dtype(b[part]), scales[part])
    return ys, s


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
    weights = split_parts(weights)
    bias_sizes = [b_g.shape[0] if need else 0 for b_g, need in zip(b, need_dbias, strict=True)]
    dbias = [new(x, size, dtype=torch.float32) for size in bias_sizes]
    parts = _parts(len(weights))
    # One launch covers three linears; the dx of more of them is added up in fp32.
    dx = rows.new_empty(rows.shape if need_dx else 0, dtype=x.dtype if len(parts) == 1 else torch.float32)
    if rows.shape[0]:
        for part in parts:
            s_part = _columns(s, ranks, part)
            a_part, b_part = _same_dtype(a[part]), _same_dtype(b[part])
            ds = _rank_gradients(dys[part], b_part, scales[part], s_part)
            if need_dx:
                add = part.start > 0
                if any(map(is_quantised, weights[part])):
                    _quantised_input_gradient(dx, dys[part], ds, weights[part], a_part, dropout, seed, add)
                else:
                    dense = [w for (w,) in weights[part]]
                    _input_gradient(dx, dys[part], ds, dense, a_part, dropout, seed, add)
            _adapter_gradients(
                da[part], db[part], dbias[part], dys[part], rows, s_part, ds, scales[part], dropout, seed
            )
    return dx.to(x.dtype).view(x.shape if need_dx else (0,)), da, db, dbias


def _parts(groups: int) -> list[slice]:
    return [slice(i, min(i + config.MAX_GROUPS, groups)) for i in range(0, groups, config.MAX_GROUPS)]


def _columns(s: torch.Tensor, ranks: list[int], part: slice) -> torch.Tensor:
    """The columns of s that belong to the linears of a part."""
    if part.start == 0 and part.stop == len(ranks):
        return s
    return s.narrow(1, sum(ranks[: part.start]), sum(ranks[part]))


def _same_dtype(matrices: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One launch reads all its adapters through one pointer type; kernels cast the tiles to x's dtype."""
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


def _outputs(ys, x, s, weights, biases, b, scales) -> None:
    rows, inner = x.shape
    sizes = tuple(w.shape[0] for w in weights)
    if any(c is None for c in biases) and any(c is not None for c in biases):
        biases = [x.new_zeros(n) if c is None else c for n, c in zip(sizes, biases, strict=True)]
    ranks = tuple(m.shape[1] for m in b)
    tile = config.matmul_tile(x, rows, sum(sizes))
    grid = (config.cdiv(rows, tile.m) * sum(config.cdiv(n, tile.n) for n in sizes),)
    launch(
        _outputs_kernel, grid, tuple(ys), x, s, tuple(w.contiguous() for w in weights),
        None if biases[0] is None else tuple(biases), b, tuple(map(float, scales)), rows, inner, sizes, ranks,
        x.stride(0), s.stride(0), BM=tile.m, BN=tile.n, BK=tile.k, BR=config.rank_block(x, ranks, max(ranks)),
        ALIGN=config.alignment((*ranks, s.stride(0))), GROUP=config.TILE_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _quantised_outputs(ys, rows, s, weights, biases, b, scales) -> None:
    factors = s.split([b_g.shape[1] for b_g in b], 1)
    for y, weight, bias, s_g, b_g, scale in zip(ys, weights, biases, factors, b, scales, strict=True):
        as_rows(y).copy_(project(rows, weight, bias, "triton")).addmm_(s_g, b_g.to(s.dtype).t(), alpha=scale)


def _rank_gradients(dys, b, scales, s) -> torch.Tensor:
    """ds (tokens, Σr) with ds_g = scale_g dy_g B_g."""
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


def _input_gradient(dx, dys, ds, weights, a, dropout, seed, add: bool) -> None:
    rows, inner = dx.shape
    sizes = tuple(w.shape[0] for w in weights)
    ranks = tuple(m.shape[0] for m in a)
    # The mask takes registers beside the accumulator: some ten for each counter.
    elements = 128 if dropout == 0 else 16 if ds.dtype == torch.float32 else 64 if inner % 4 == 0 else 32
    tile = config.matmul_tile(ds, rows, inner, elements)
    seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
    grid = (config.cdiv(rows, tile.m) * config.cdiv(inner, tile.n),)
    launch(
        _input_gradient_kernel, grid, dx, tuple(dys), ds, tuple(w.contiguous() for w in weights), a, seed, rows, inner,
        sizes, ranks, tuple(dy.stride(0) for dy in dys), ds.stride(0), threshold, keep_scale,
        **constants, ADD=add, BM=tile.m, BN=tile.n, BK=tile.k,
        BR=config.rank_block(ds, ranks, sum(ranks)), ALIGN=config.alignment(ranks), GROUP=config.TILE_GROUP,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _quantised_input_gradient(dx, dys, ds, weights, a, dropout, seed, add: bool) -> None:
    total = philox.dropout(ds @ torch.cat(a).to(ds.dtype), dropout, seed)
    for dy, weight in zip(dys, weights, strict=True):
        total = total + project_back(dy, weight, "triton")
    dx.add_(total) if add else dx.copy_(total)


def _adapter_gradients(da, db, dbias, dys, x, s, ds, scales, dropout, seed) -> None:
    rows, inner = x.shape
    ranks, sizes = tuple(m.shape[0] for m in da), tuple(m.shape[0] for m in db)
    tile = config.TOKEN_SUM[config.key(x)]
    with_bias = any(g.numel() for g in dbias)
    # Biases that nobody asked for are summed too when one is wanted, and dropped.
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
    """s = drop(x) [A_1; …; A_G]ᵀ: one read of x for the whole group."""
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


@triton.jit
def _outputs_kernel(
    ys, x, s, weights, biases, b, scales, M, K, sizes, ranks, stride_x, stride_s,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y_g = x W_gᵀ + c_g + scale_g s_g B_gᵀ: the column tiles of all linears stand side by side in one grid."""
    tiles_n = 0
    for i in tl.static_range(len(sizes)):
        tiles_n += tl.cdiv(sizes[i], BN)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tiles_n, GROUP)
    g, first, end = 0, 0, 0
    for i in tl.static_range(len(sizes) - 1):
        end += tl.cdiv(sizes[i], BN)
        g = tl.where(pid_n >= end, i + 1, g)
        first = tl.where(pid_n >= end, end, first)
    N, y, weight, b_g = pick(sizes, g), pick(ys, g), pick(weights, g), pick(b, g)
    R, stride_s = aligned(pick(ranks, g), ALIGN), aligned(stride_s, ALIGN)
    s_g = s + aligned(start_of(ranks, g), ALIGN)

    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = ((pid_n - first) * BN + tl.arange(0, BN)).to(tl.int64)
    row_inside, col_inside = rows < M, cols < N

    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, R, BR, num_stages=1):
        rank = start + tl.arange(0, BR)
        left = load(s_g + rows[:, None] * stride_s + rank[None, :], row_inside, rank < R)
        right = load(b_g + cols[None, :] * R + rank[:, None], rank < R, col_inside)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    acc *= pick(scales, g)

    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < K)
        right = load(weight + cols[None, :] * K + k[:, None], k < K, col_inside)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    if biases is not None:
        acc += tl.load(pick(biases, g) + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store(y + rows[:, None] * N + cols[None, :], acc, row_inside, col_inside)


@triton.jit
def _rank_gradients_kernel(
    ds, dys, b, scales, M, sizes, ranks, stride_ds, strides_dy,
    ALIGN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """ds_g = scale_g dy_g B_g."""
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
def _input_gradient_kernel(
    dx, dys, ds, weights, a, seed, M, K, sizes, ranks, strides_dy, stride_ds, threshold, keep_scale,
    DROPOUT: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dx = Σ_g dy_g W_g + drop'(Σ_g ds_g A_g): one loop over the output columns of all linears in turn."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP)
    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    row_inside, col_inside = rows < M, cols < K

    # The rank part comes first, so that the mask falls on the one accumulator before anything else is in it.
    acc = tl.zeros((BM, BN), tl.float32)
    R, stride_ds = aligned(total_size(ranks), ALIGN), aligned(stride_ds, ALIGN)
    for start in tl.range(0, R, BR, num_stages=1):
        rank = start + tl.arange(0, BR)
        left = load(ds + rows[:, None] * stride_ds + rank[None, :], row_inside, rank < R)
        a_rows = stacked_rows(a, ranks, rank, K)
        right = load(a_rows[:, None] + cols[None, :], rank < R, col_inside)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    if DROPOUT:
        acc = drop(acc, seed, rows, pid_n * BN, K, threshold, keep_scale)

    steps = 0
    for i in tl.static_range(len(sizes)):
        steps += tl.cdiv(sizes[i], BK)
    for step in range(0, steps):
        g, first, end = 0, 0, 0
        for i in tl.static_range(len(sizes) - 1):
            end += tl.cdiv(sizes[i], BK)
            g = tl.where(step >= end, i + 1, g)
            first = tl.where(step >= end, end, first)
        N, dy, weight, stride_dy = pick(sizes, g), pick(dys, g), pick(weights, g), pick(strides_dy, g)
        n = (step - first) * BK + tl.arange(0, BK)
        left = load(dy + rows[:, None] * stride_dy + n[None, :], row_inside, n < N)
        right = load(weight + n[:, None].to(tl.int64) * K + cols[None, :], n < N, col_inside)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    out = dx + rows[:, None] * K + cols[None, :]
    if ADD:
        acc += load(out, row_inside, col_inside)
    store(out, acc, row_inside, col_inside)


@triton.jit(do_not_specialize=["threshold"])
def _adapter_gradients_kernel(
    partials, dys, x, s, ds, seed, scales, M, K, sizes, ranks, strides_dy, stride_x, stride_s, stride_ds, total,
    a_start, bias_start, b_tiles, b_chunks, a_tiles, threshold, keep_scale,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR_A: tl.constexpr, BR_B: tl.constexpr,
):  # fmt: skip
    """This split's part of every dB_g, then of every dA_g: side by side in one grid."""
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
