"""frozen_linear in Triton: y = x Wᵀ + c, dx = dy W, dbias = Σ dy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, launch, load, store, sum_partials, swizzle


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = matmul(as_rows(x), weight, bias, transposed=True)
    return y.view(*x.shape[:-1], weight.shape[0])


def frozen_linear_backward(
    dy: torch.Tensor, weight: torch.Tensor, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = as_rows(dy)
    dx, dbias = dy.new_empty(0), dy.new_empty(0)
    if need_dx:
        dx = matmul(rows, weight, None, transposed=False).view(*dy.shape[:-1], weight.shape[1])
    if need_dbias:
        dbias = column_sums(rows)
    return dx, dbias


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """x (M, K) times weightᵀ (weight is (N, K)) when transposed, else times weight (K, N); plus bias (N)."""
    weight = weight.contiguous()
    rows, inner = x.shape
    cols = weight.shape[0] if transposed else weight.shape[1]
    y = x.new_empty(rows, cols)
    if rows == 0:
        return y
    tile = config.matmul_tile(x, rows, cols)
    grid = (config.cdiv(rows, tile.m) * config.cdiv(cols, tile.n),)
    launch(
        _matmul_kernel, grid, y, x, weight, bias, rows, cols, inner, x.stride(0),
        TRANSPOSED=transposed, BM=tile.m, BN=tile.n, BK=tile.k, GROUP=config.TILE_GROUP,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ over the rows of x (M, N), in fp32."""
    rows, cols = x.shape
    sums = x.new_zeros(cols, dtype=torch.float32)
    if rows == 0:
        return sums
    tile = config.TOKEN_SUM[config.key(x)]
    tiles = config.cdiv(cols, tile.n)
    splits = config.splits(x, tile, tiles)
    partials = x.new_empty(splits, cols, dtype=torch.float32)
    launch(
        _column_sums_kernel, (tiles, splits), partials, x, rows, cols, x.stride(0),
        BM=tile.k, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    sum_partials(partials, [sums])
    return sums


@triton.jit
def _matmul_kernel(
    y, x, weight, bias, M, N, K, stride_x,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    inner = tl.arange(0, BK)
    row_inside, col_inside = rows < M, cols < N

    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + inner
        a = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < K)
        if TRANSPOSED:
            w = weight + cols[None, :] * K + k[:, None]
        else:
            w = weight + k[:, None].to(tl.int64) * N + cols[None, :]
        b = load(w, k < K, col_inside)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store(y + rows[:, None] * N + cols[None, :], acc, row_inside, col_inside)


@triton.jit
def _column_sums_kernel(partials, x, M, N, stride_x, BM: tl.constexpr, BN: tl.constexpr):
    split, splits = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    stop = min((split + 1) * length, M)

    acc = tl.zeros((BN,), tl.float32)
    for start in range(split * length, stop, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        tile = load(x + rows[:, None] * stride_x + cols[None, :], rows < stop, cols < N)
        acc += tl.sum(tile.to(tl.float32), 0)
    tl.store(partials + split * N + cols, acc, mask=cols < N)
