"""layer_norm in Triton, and rms_norm, which is the same without a mean and a bias.

Forward, the output again from its statistics, and dx: one program a row, in steps of as many columns as the row has or
a block holds. Memory is read once: the second walk over a row finds it in the cache. The parameters' gradients, which
frozen norms do not need, are a second launch over tiles of columns and parts of the tokens, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, launch, load, sum_partials
from petl_kernels.backends.triton.frozen_linear import column_sums
from petl_kernels.ops.room import roomy


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, room: int = 0):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return norm(x, mean, rstd, weight, bias, eps, room), mean, rstd


def layer_norm_from_statistics(x, mean, rstd, weight, bias, room: int = 0) -> torch.Tensor:
    return norm_again(x, mean, rstd, weight, bias, room)


def layer_norm_backward(dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias):
    dx = norm_dx(dy, x, mean, rstd, weight) if need_dx else x.new_empty(0)
    dweight, dbias = rstd.new_empty(0), rstd.new_empty(0)
    if need_dweight:
        dweight, *more = norm_sums(dy, x, mean, rstd, need_dbias)
        dbias = more[0] if need_dbias else dbias
    elif need_dbias:
        dbias = column_sums(as_rows(dy))
    return dx, dweight, dbias


def norm(x, mean, rstd, weight, bias, eps: float, room: int = 0) -> torch.Tensor:
    """y, with ``room`` columns free behind each row; writes rstd, and the mean unless it is None."""
    rows, d = as_rows(x), x.shape[-1]
    y = _output(x, weight, room)
    _launch_rows(_norm_kernel, rows, y, mean, rstd, rows, weight, bias, d, d + room, rows.stride(0), eps)
    return y


def norm_again(x, mean, rstd, weight, bias, room: int = 0) -> torch.Tensor:
    rows, d = as_rows(x), x.shape[-1]
    y = _output(x, weight, room)
    mean, rstd = None if mean is None else mean.contiguous(), rstd.contiguous()
    _launch_rows(_norm_again_kernel, rows, y, mean, rstd, rows, weight, bias, d, d + room, rows.stride(0))
    return y


def norm_dx(dy, x, mean, rstd, weight) -> torch.Tensor:
    rows, dys = as_rows(x), as_rows(dy)
    dx = x.new_empty(x.shape)
    strides = (dys.stride(0), rows.stride(0))
    _launch_rows(_norm_dx_kernel, rows, dx, dys, rows, mean, rstd, weight, rows.shape[1], *strides)
    return dx


def norm_sums(dy, x, mean, rstd, with_bias: bool) -> list[torch.Tensor]:
    """[dw], or [dw, dv]."""
    rows, dys = as_rows(x), as_rows(dy)
    tokens, d = rows.shape
    sums = [x.new_zeros(d, dtype=torch.float32) for _ in range(2 if with_bias else 1)]
    if tokens:
        tile = config.pointwise_tile(x)
        tiles = config.cdiv(d, tile.n)
        splits = config.splits(rows, tile, tiles)
        partials = x.new_empty(splits, len(sums) * d, dtype=torch.float32)
        launch(
            _norm_sums_kernel, (tiles, splits), partials, dys, rows, mean, rstd, tokens, d, dys.stride(0),
            rows.stride(0), BIAS=with_bias, BM=tile.k, BN=tile.n, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        sum_partials(partials, sums)
    return sums


def _output(x: torch.Tensor, weight: torch.Tensor, room: int) -> torch.Tensor:
    return roomy(x, x.shape, room, torch.promote_types(x.dtype, weight.dtype))


def _launch_rows(kernel, rows: torch.Tensor, *args) -> None:
    if rows.shape[0]:
        block, warps = config.row_block(rows)
        args = (arg.contiguous() if isinstance(arg, torch.Tensor) and arg.dim() == 1 else arg for arg in args)
        launch(kernel, (rows.shape[0],), *args, BN=block, warps=warps, stages=1)


@triton.jit
def read(pointers, cols, d):
    return tl.load(pointers + cols, mask=cols < d, other=0.0).to(tl.float32)


@triton.jit
def write_step(y, values, mean, rstd, weight, bias, cols, d):
    """((values - mean) rstd) w + v, at ``cols`` of a row."""
    out = (values - mean) * rstd * read(weight, cols, d)
    if bias is not None:
        out += read(bias, cols, d)
    tl.store(y + cols, out.to(y.dtype.element_ty), mask=cols < d)


@triton.jit
def add_step(total, square, values, shift, cols, d):
    """Σ and Σ² of differences from ``shift``, with those of one step of a row in them."""
    centred = tl.where(cols < d, values - shift, 0.0)
    return total + centred, square + centred * centred


@triton.jit
def statistics(total, square, shift, d, eps, CENTRED: tl.constexpr):
    """(mean, rstd) from the sums of a row; the mean is 0 without CENTRED."""
    variance = tl.sum(square, 0) / d
    centre = 0.0
    if CENTRED:
        rest = tl.sum(total, 0) / d
        variance = tl.maximum(variance - rest * rest, 0.0)
        centre = shift + rest
    return centre, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def step_gradient(g, normalised, mean_g, mean_gn, rstd):
    return rstd * (g - mean_g - normalised * mean_gn)


@triton.jit
def _write_row(y, x, mean, rstd, weight, bias, d, BN: tl.constexpr):
    """y of a row: in one place, so that forward and the output again have the same bits."""
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        write_step(y, read(x, cols, d), mean, rstd, weight, bias, cols, d)


@triton.jit
def _norm_kernel(y, mean, rstd, x, weight, bias, d, stride_y, stride_x, eps, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    shift = 0.0
    if mean is not None:
        # Sums of differences from the mean of the first step: exact enough however far from zero the row is.
        cols = tl.arange(0, BN)
        shift = tl.sum(read(x, cols, d), 0) / min(d, BN)
    total = tl.zeros((BN,), tl.float32)
    square = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        total, square = add_step(total, square, read(x, cols, d), shift, cols, d)
    centre, r = statistics(total, square, shift, d, eps, mean is not None)
    if mean is not None:
        tl.store(mean + row, centre)
    tl.store(rstd + row, r)
    _write_row(y + row * stride_y, x, centre, r, weight, bias, d, BN)


@triton.jit
def _norm_again_kernel(y, mean, rstd, x, weight, bias, d, stride_y, stride_x, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    centre = 0.0
    if mean is not None:
        centre = tl.load(mean + row)
    _write_row(y + row * stride_y, x + row * stride_x, centre, tl.load(rstd + row), weight, bias, d, BN)


@triton.jit
def _norm_dx_kernel(dx, dy, x, mean, rstd, weight, d, stride_dy, stride_x, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dx, dy, x = dx + row * d, dy + row * stride_dy, x + row * stride_x
    centre = 0.0
    if mean is not None:
        centre = tl.load(mean + row)
    r = tl.load(rstd + row)
    sum_g = tl.zeros((BN,), tl.float32)
    sum_gn = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        g = read(dy, cols, d) * read(weight, cols, d)
        sum_g += g
        sum_gn += g * ((read(x, cols, d) - centre) * r)
    mean_g = 0.0
    if mean is not None:
        mean_g = tl.sum(sum_g, 0) / d
    mean_gn = tl.sum(sum_gn, 0) / d
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        g = read(dy, cols, d) * read(weight, cols, d)
        out = step_gradient(g, (read(x, cols, d) - centre) * r, mean_g, mean_gn, r)
        tl.store(dx + cols, out.to(dx.dtype.element_ty), mask=cols < d)


@triton.jit
def _norm_sums_kernel(
    partials, dy, x, mean, rstd, M, d, stride_dy, stride_x, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """This split's part of dw = Σ dy x̂, and of dv = Σ dy behind it."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    stop = min((split + 1) * length, M)
    weight_sum = tl.zeros((BN,), tl.float32)
    bias_sum = tl.zeros((BN,), tl.float32)
    for start in range(split * length, stop, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        inside = rows < stop
        normalised = load(x + rows[:, None] * stride_x + cols[None, :], inside, cols < d).to(tl.float32)
        if mean is not None:
            normalised -= tl.load(mean + rows, mask=inside, other=0.0)[:, None]
        normalised *= tl.load(rstd + rows, mask=inside, other=0.0)[:, None]
        grad = load(dy + rows[:, None] * stride_dy + cols[None, :], inside, cols < d).to(tl.float32)
        weight_sum += tl.sum(grad * normalised, 0)
        bias_sum += tl.sum(grad, 0)
    if BIAS:
        tl.store(partials + split * 2 * d + cols, weight_sum, mask=cols < d)
        tl.store(partials + split * 2 * d + d + cols, bias_sum, mask=cols < d)
    else:
        tl.store(partials + split * d + cols, weight_sum, mask=cols < d)
