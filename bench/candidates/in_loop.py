"""s inside y's main loop and ds inside dx's: each column tile forms them again beside its accumulator.

A read of x, a read of dy and two launches fewer, for BR / BN more tensor work (BR: the ranks padded to 16 or more).
The first column tile of each row block writes s (and ds), which backward reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from frame import pair, shipped

from petl_kernels.backends.triton import common, config
from petl_kernels.backends.triton.common import load, pick, start_of, store, swizzle

MAX_RANK = 64  # of one linear: above, the second accumulator costs more than a pass over x


def _tile(x, rows, cols, block):
    # Registers for both accumulators: 128 x 256 is left out.
    tile = config.matmul_tile(x, rows, cols, 64)
    return tile._replace(k=32) if block > 16 and tile.k > 32 and tile.n >= 128 else tile


def _outputs(ys, s, x, weights, biases, a, b, scales) -> None:
    ranks, sizes = tuple(m.shape[0] for m in a), tuple(w.shape[0] for w in weights)
    assert max(ranks) <= MAX_RANK
    if any(c is None for c in biases) and any(c is not None for c in biases):
        biases = [x.new_zeros(n) if c is None else c for n, c in zip(sizes, biases, strict=True)]
    block = config.padded(max(ranks), MAX_RANK)
    tile = _tile(x, x.shape[0], sum(sizes), block)
    grid = (triton.cdiv(x.shape[0], tile.m) * sum(triton.cdiv(n, tile.n) for n in sizes),)
    common.launch(
        _outputs_kernel, grid, tuple(ys), s, x, tuple(w.contiguous() for w in weights),
        None if biases[0] is None else tuple(biases), a, b, tuple(map(float, scales)), *x.shape, sizes, ranks,
        x.stride(0), s.stride(0), BM=tile.m, BN=tile.n, BK=tile.k, BR=block, GROUP=config.TILE_GROUP,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _gradients(dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    rows, inner = dx.shape
    ranks, sizes = tuple(m.shape[0] for m in a), tuple(w.shape[0] for w in weights)
    assert max(ranks) <= MAX_RANK
    ds = s.new_empty(s.shape)
    block = config.padded(max(ranks), MAX_RANK)
    tile = _tile(s, rows, inner, block)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(inner, tile.n),)
    common.launch(
        _input_gradient_kernel, grid, dx, ds, tuple(dys), tuple(w.contiguous() for w in weights), a, b,
        tuple(map(float, scales)), rows, inner, sizes, ranks, tuple(dy.stride(0) for dy in dys), ds.stride(0),
        BM=tile.m, BN=tile.n, BK=tile.k, BR=block, GROUP=config.TILE_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    shipped._adapter_gradients(da, db, dbias, dys, x, s, ds, scales, 0.0, None)


@triton.jit
def _outputs_kernel(
    ys, s, x, weights, biases, a, b, scales, M, K, sizes, ranks, stride_x, stride_s,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y_g = x W_gᵀ + c_g + scale_g s_g B_gᵀ, s_g = x A_gᵀ."""
    tiles_n = 0
    for i in tl.static_range(len(sizes)):
        tiles_n += tl.cdiv(sizes[i], BN)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tiles_n, GROUP)
    g, first, end = 0, 0, 0
    for i in tl.static_range(len(sizes) - 1):
        end += tl.cdiv(sizes[i], BN)
        g = tl.where(pid_n >= end, i + 1, g)
        first = tl.where(pid_n >= end, end, first)
    N, R, y, weight, b_g = pick(sizes, g), pick(ranks, g), pick(ys, g), pick(weights, g), pick(b, g)
    a_g, start_s = pick(a, g), start_of(ranks, g)

    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = ((pid_n - first) * BN + tl.arange(0, BN)).to(tl.int64)
    rank = tl.arange(0, BR)
    row_inside, col_inside = rows < M, cols < N

    acc = tl.zeros((BM, BN), tl.float32)
    acc_s = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < K)
        right = load(weight + cols[None, :] * K + k[:, None], k < K, col_inside)
        factor = load(a_g + rank[None, :] * K + k[:, None], k < K, rank < R)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        acc_s = tl.dot(left, factor.to(left.dtype), acc_s, input_precision="ieee")

    left = acc_s.to(x.dtype.element_ty)
    if pid_n == first:
        store(s + start_s + rows[:, None] * stride_s + rank[None, :], left, row_inside, rank < R)
    right = load(b_g + cols[None, :] * R + rank[:, None], rank < R, col_inside)
    # The scale goes on the accumulator, not on a rounded factor: acc / scale would not be exact.
    acc += pick(scales, g) * tl.dot(left, right.to(left.dtype), input_precision="ieee")
    if biases is not None:
        acc += tl.load(pick(biases, g) + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store(y + rows[:, None] * N + cols[None, :], acc, row_inside, col_inside)


@triton.jit
def _input_gradient_kernel(
    dx, ds, dys, weights, a, b, scales, M, K, sizes, ranks, strides_dy, stride_ds,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = Σ_g dy_g W_g + ds_g A_g, ds_g = scale_g dy_g B_g."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP)
    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    rank = tl.arange(0, BR)
    row_inside, col_inside = rows < M, cols < K

    acc = tl.zeros((BM, BN), tl.float32)
    start_ds = 0
    for g in tl.static_range(len(sizes)):
        N, R = sizes[g], ranks[g]
        acc_ds = tl.zeros((BM, BR), tl.float32)
        for start in range(0, N, BK):
            n = start + tl.arange(0, BK)
            left = load(dys[g] + rows[:, None] * strides_dy[g] + n[None, :], row_inside, n < N)
            right = load(weights[g] + n[:, None].to(tl.int64) * K + cols[None, :], n < N, col_inside)
            factor = load(b[g] + n[:, None] * R + rank[None, :], n < N, rank < R)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            acc_ds = tl.dot(left, factor.to(left.dtype), acc_ds, input_precision="ieee")
        ds_tile = (acc_ds * scales[g]).to(ds.dtype.element_ty)
        if pid_n == 0:
            store(ds + start_ds + rows[:, None] * stride_ds + rank[None, :], ds_tile, row_inside, rank < R)
        a_tile = load(a[g] + rank[:, None] * K + cols[None, :], rank < R, col_inside)
        acc = tl.dot(ds_tile, a_tile.to(ds_tile.dtype), acc, input_precision="ieee")
        start_ds += R
    store(dx + rows[:, None] * K + cols[None, :], acc, row_inside, col_inside)


_functions = pair(_outputs, _gradients)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
