"""frozen_linear with the library's products, y = x Wᵀ + c and dx = dy W, and the sums over tokens in Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, launch, load, sum_partials
from petl_kernels.backends.triton.registry import serves


@serves
def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight, bias)


@serves
def frozen_linear_backward(
    dy: torch.Tensor, weight: torch.Tensor, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = as_rows(dy)
    dx, dbias = dy.new_empty(0), dy.new_empty(0)
    if need_dx:
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
    if need_dbias:
        dbias = column_sums(rows)
    return dx, dbias


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the rows of x (M, N), in fp32 (N,)."""
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
