"""Persistent products with TMA: sm_90 and sm_100 only.

One program a multiprocessor walks over the output tiles; both operands come through tensor descriptors, and y and dx
leave through one. The rank part is seeded into the accumulator, as in the shipped kernel, so that its scale stays
fp32. `tma_flat.py` makes one loop of tiles and steps (FLATTEN), so that the next tile's copies start under this tile's
epilogue; `tma_warps.py` gives loads and products warps of their own. One launch a linear; the dx of a group is the
shipped kernel's.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from frame import pair, shipped

from petl_kernels.backends.triton import common, config
from petl_kernels.backends.triton.common import load, swizzle

TILES = {
    "sm90": config.Tile(128, 256, 64, 8, 3),
    "sm100": config.Tile(128, 256, 64, 8, 3),
    "interpreter": config.Tile(32, 32, 32, 4, 1),
}
SPECIALISED = config.Tile(128, 128, 64, 4, 3)  # sm_100: its loads and products run on warps of their own
MAX_RANK = 64


def runs_on(x: torch.Tensor) -> bool:
    return config.key(x) in TILES


def _scratch(size: int, align: int, stream) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # descriptors that the kernel makes


def _product(
    out, left, right, rank_left, rank_right, scale: float, bias, by_rows: bool, flatten: bool, specialise: bool
) -> None:
    """out = left rightᵀ + scale · rank_left rank_rightᵀ + bias; by_rows: with right and rank_right not transposed."""
    rows, inner = left.shape
    cols = out.shape[1]
    # TMA wants rows that begin at multiples of 16 bytes.
    assert all(t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1 for t in (left, right, out))
    tile = TILES[config.key(left)]
    if specialise and tile is not TILES["interpreter"]:
        tile = SPECIALISED
    elif triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n) < config.processors(left.device) and tile.n > 128:
        tile = tile._replace(n=128, stages=4)
    if left.is_cuda:
        triton.set_allocator(_scratch)
    rank = rank_left.shape[1]
    grid = (min(config.processors(left.device), triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n)),)
    common.launch(
        _product_kernel, grid, out, left, right, rank_left, rank_right, float(scale), bias, rows, cols, inner, rank,
        left.stride(0), right.stride(0), rank_left.stride(0), out.stride(0), BY_ROWS=by_rows, FLATTEN=flatten,
        SPECIALISE=specialise, PROGRAMS=config.processors(left.device), BM=tile.m, BN=tile.n, BK=tile.k,
        BR=config.padded(rank, MAX_RANK),
        GROUP=config.TILE_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _outputs(loops, ys, s, x, weights, biases, a, b, scales) -> None:
    shipped._project(s, x, a, 0.0, None)
    factors = s.split([m.shape[1] for m in b], 1)
    for y, weight, bias, factor, b_g, scale in zip(ys, weights, biases, factors, b, scales, strict=True):
        _product(y, x, weight, factor, b_g, scale, bias, by_rows=False, **loops)


def _gradients(loops, dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    ds = shipped._rank_gradients(dys, b, scales, s)
    if len(dys) == 1:
        _product(dx, dys[0], weights[0], ds, a[0], 1.0, None, by_rows=True, **loops)
    else:
        shipped._input_gradient(dx, dys, ds, weights, a, 0.0, None, False)
    shipped._adapter_gradients(da, db, dbias, dys, x, s, ds, scales, 0.0, None)


@triton.jit
def _product_kernel(
    out, left, right, rank_left, rank_right, scale, bias, M, N, K, R, stride_left, stride_right, stride_rank,
    stride_out, BY_ROWS: tl.constexpr, FLATTEN: tl.constexpr, SPECIALISE: tl.constexpr, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    left_tiles = tl.make_tensor_descriptor(left, [M, K], [stride_left, 1], [BM, BK])
    if BY_ROWS:
        right_tiles = tl.make_tensor_descriptor(right, [K, N], [stride_right, 1], [BK, BN])
    else:
        right_tiles = tl.make_tensor_descriptor(right, [N, K], [stride_right, 1], [BN, BK])
    out_tiles = tl.make_tensor_descriptor(out, [M, N], [stride_out, 1], [BM, BN])
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    rank = tl.arange(0, BR)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        pid_m, pid_n = swizzle(tile, tiles_m, tiles_n, GROUP)
        rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
        cols = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
        rank_tile = load(rank_left + rows[:, None] * stride_rank + rank[None, :], rows < M, rank < R)
        if BY_ROWS:
            factor = load(rank_right + rank[:, None] * N + cols[None, :], rank < R, cols < N)
        else:
            factor = load(rank_right + cols[None, :] * R + rank[:, None], rank < R, cols < N)
        acc = tl.dot(rank_tile, factor.to(rank_tile.dtype), input_precision="ieee") * scale
        for k in tl.range(0, K, BK, warp_specialize=SPECIALISE):
            block = left_tiles.load([pid_m * BM, k])
            if BY_ROWS:
                acc = tl.dot(block, right_tiles.load([k, pid_n * BN]), acc, input_precision="ieee")
            else:
                acc = tl.dot(block, right_tiles.load([pid_n * BN, k]).T, acc, input_precision="ieee")
        if bias is not None:
            acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        out_tiles.store([pid_m * BM, pid_n * BN], acc.to(out.dtype.element_ty))


def make(flatten: bool, specialise: bool) -> SimpleNamespace:
    loops = {"flatten": flatten, "specialise": specialise}
    return pair(functools.partial(_outputs, loops), functools.partial(_gradients, loops))


_functions = make(flatten=False, specialise=False)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
