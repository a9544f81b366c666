"""layer_norm in Triton, and rms_norm, which is the same without a mean and a bias.

Forward and the output again from its statistics: one program a row, in steps of as many columns as the row has or a
block holds. Memory is read once: the second walk over a row finds it in the cache.

Backward is one pass, which `dropout_add_norm` has too: a program holds a few whole rows, and each thread some columns
of all of them, so that a sum over tokens crosses no thread. Where the parameters' gradients are wanted a fixed number
of programs walks over the rows and copies the next ones ahead; each writes its part of the sums, which `sum_partials`
adds in a fixed order. Rows of more than 4096 take two launches: one that steps along a row, and the pass without dx,
which needs no whole row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, drop, dropout_arguments, launch, load, store, sum_partials
from petl_kernels.backends.triton.registry import serves, serves_with_room
from petl_kernels.ops.room import roomy


@serves_with_room
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, room: int = 0):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return norm(x, mean, rstd, weight, bias, eps, room), mean, rstd


@serves_with_room
def layer_norm_from_statistics(x, mean, rstd, weight, bias, room: int = 0) -> torch.Tensor:
    return norm_again(x, mean, rstd, weight, bias, room)


@serves
def layer_norm_backward(dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias):
    dx, _, dweight, dbias, _ = norm_backward(dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias)
    return dx, dweight, dbias


def norm(x, mean, rstd, weight, bias, eps: float, room: int = 0) -> torch.Tensor:
    """Returns y with ``room`` free columns behind each row; writes rstd, and the mean unless it is None."""
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


def norm_backward(
    du, x, mean, rstd, weight, need_dx: bool, need_dweight: bool, need_dbias: bool = False, dresidual=None, dtype=None,
    p: float = 0.0, seed=None, need_residual_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (dx, dy, dw, dv, Σ dresidual), of size 0 where not needed.

    dx = norm'(du) + dresidual, and dy = drop(dx) in ``dtype``. Longer rows than
    `config.whole_rows` allows take neither dresidual nor ``dtype``.
    """
    rows, dus = as_rows(x), as_rows(du)
    tokens, d = rows.shape
    dx = x.new_empty(x.shape if need_dx else 0)
    dy = x.new_empty(0 if dtype is None else x.shape, dtype=dtype)
    needs = need_dweight, need_dbias, need_residual_sum
    sums = [x.new_zeros(d if needed else 0, dtype=torch.float32) for needed in needs]
    wanted = [own for own in sums if own.numel()]
    mean, rstd, weight = contiguous(mean), rstd.contiguous(), weight.contiguous()
    if need_dx and not config.whole_rows(rows):
        _launch_rows(_norm_dx_kernel, rows, dx, dus, rows, mean, rstd, weight, d, dus.stride(0), rows.stride(0))
        need_dx = False
    if tokens and (need_dx or wanted):
        dresiduals = None if dresidual is None else as_rows(dresidual)
        grid, tile = config.row_programs(rows, bool(wanted))
        partials: Any = x.new_empty(grid[0], len(wanted) * d, dtype=torch.float32) if wanted else None
        seed, threshold, keep_scale, _ = dropout_arguments(p, seed)
        launch(
            _norm_backward_kernel, grid, dx if need_dx else None, None if dtype is None else dy, partials, dus,
            dresiduals, rows, mean, rstd, weight, seed, tokens, d, dus.stride(0),
            0 if dresiduals is None else dresiduals.stride(0), rows.stride(0), threshold, keep_scale,
            WEIGHT=need_dweight, BIAS=need_dbias, RESIDUAL_SUM=need_residual_sum, ROWS=tile.m, BN=tile.n,
            AHEAD=tile.stages, warps=tile.warps, stages=1,
        )  # fmt: skip
        if wanted:
            sum_partials(partials, wanted)
    return dx, dy, *sums


def _output(x: torch.Tensor, weight: torch.Tensor, room: int) -> torch.Tensor:
    return roomy(x, x.shape, room, torch.promote_types(x.dtype, weight.dtype))


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


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
    """Writes ((values - mean) rstd) w + v to columns ``cols`` of a row."""
    out = (values - mean) * rstd * read(weight, cols, d)
    if bias is not None:
        out += read(bias, cols, d)
    tl.store(y + cols, out.to(y.dtype.element_ty), mask=cols < d)


@triton.jit
def add_step(total, square, values, shift, cols, d):
    """Returns Σ and Σ² of differences from ``shift``, after one more step along a row."""
    centred = tl.where(cols < d, values - shift, 0.0)
    return total + centred, square + centred * centred


@triton.jit
def statistics(total, square, shift, d, eps, CENTRED: tl.constexpr):
    """Returns (mean, rstd) from the sums of a row; the mean is 0 without CENTRED."""
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
    """Writes y of a row, for both kernels that write y, whose bits have to be the same."""
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


@triton.jit(do_not_specialize=["threshold"])
def _norm_backward_kernel(
    dx, dy, partials, du, dresidual, x, mean, rstd, weight, seed, M, d, stride_du, stride_dresidual, stride_x,
    threshold, keep_scale, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL_SUM: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Writes dx and dy of whole rows, and this program's parts of dw = Σ du x̂, dv = Σ du and Σ dresidual, end to end.

    Without dx the second axis of the grid may have blocks of columns.
    """
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_inside = cols < d
    gain = read(weight, cols, d)[None, :]
    weight_sum = tl.zeros((BN,), tl.float32)
    bias_sum = tl.zeros((BN,), tl.float32)
    residual_sum = tl.zeros((BN,), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=AHEAD):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < M
        r = tl.load(rstd + rows, mask=inside, other=0.0)[:, None]
        grad = load(du + rows[:, None] * stride_du + cols[None, :], inside, col_inside).to(tl.float32)
        normalised = load(x + rows[:, None] * stride_x + cols[None, :], inside, col_inside).to(tl.float32)
        if mean is not None:
            normalised -= tl.load(mean + rows, mask=inside, other=0.0)[:, None]
        normalised *= r
        if WEIGHT:
            weight_sum += tl.sum(grad * normalised, 0)
        if BIAS:
            bias_sum += tl.sum(grad, 0)
        if dx is not None:
            g = grad * gain
            mean_g = 0.0
            if mean is not None:
                mean_g = (tl.sum(g, 1) / d)[:, None]
            mean_gn = (tl.sum(g * normalised, 1) / d)[:, None]
            stored = step_gradient(g, normalised, mean_g, mean_gn, r).to(dx.dtype.element_ty)
            if dresidual is not None:
                more = load(dresidual + rows[:, None] * stride_dresidual + cols[None, :], inside, col_inside)
                stored = (stored.to(tl.float32) + more.to(tl.float32)).to(dx.dtype.element_ty)
                if RESIDUAL_SUM:
                    residual_sum += tl.sum(more.to(tl.float32), 0)
            at = rows[:, None] * d + cols[None, :]
            store(dx + at, stored, inside, col_inside)
            if dy is not None:
                dropped = stored.to(tl.float32)
                if seed is not None:
                    dropped = drop(dropped, seed, rows, 0, d, threshold, keep_scale)
                store(dy + at, dropped, inside, col_inside)
    if WEIGHT or BIAS or RESIDUAL_SUM:
        partials += tl.program_id(0) * (WEIGHT + BIAS + RESIDUAL_SUM) * d
        if WEIGHT:
            tl.store(partials + cols, weight_sum, mask=col_inside)
        if BIAS:
            tl.store(partials + WEIGHT * d + cols, bias_sum, mask=col_inside)
        if RESIDUAL_SUM:
            tl.store(partials + (WEIGHT + BIAS) * d + cols, residual_sum, mask=col_inside)
