"""dropout_add_norm in Triton: h = residual + drop(y) and u = norm(h) in one launch, and the gradients of both in one.

A program holds a row in registers, up to 32 columns a thread, so that a row of 1024 is one warp's own and its sums
cross no other. Memory is read once and written once: 8 bytes an element forward and 10 backward in 16 bit. Gradients of
the norm's parameters ride along: a few programs for each multiprocessor walk over the rows then, and each holds its
part of the sums. A row that is too long for one program takes the kernels of the two ops, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, drop, dropout_arguments, launch, sum_partials
from petl_kernels.backends.triton.dropout_add import dropout_add, dropout_add_backward
from petl_kernels.backends.triton.layer_norm import (
    add_step,
    layer_norm,
    layer_norm_backward,
    read,
    statistics,
    step_gradient,
    write_step,
)
from petl_kernels.backends.triton.rms_norm import rms_norm, rms_norm_backward
from petl_kernels.ops.room import roomy


def dropout_add_norm(y, residual, weight, bias, eps: float, p: float, seed, centred: bool, room: int = 0):
    rows, residuals = as_rows(y), as_rows(residual)
    tokens, d = rows.shape
    if config.row_warps(rows) is None:
        return _one_after_the_other(y, residual, weight, bias, eps, p, seed, centred, room)
    h = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, residual.dtype))
    u = roomy(y, y.shape, room, torch.promote_types(h.dtype, weight.dtype))
    rstd = y.new_empty(y.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    if tokens:
        block, warps = config.row_warps(rows)
        seed, threshold, keep_scale, constants = dropout_arguments(p, seed, d)
        launch(
            _sum_norm_kernel, (tokens,), h, u, mean, rstd, rows, residuals, weight.contiguous(), _contiguous(bias),
            seed, d, d + room, rows.stride(0), residuals.stride(0), eps, threshold, keep_scale,
            QUADS=constants["QUADS"], BN=block, warps=warps, stages=1,
        )  # fmt: skip
    return h, u, mean if centred else rstd.new_empty(0), rstd


def dropout_add_norm_backward(du, dresidual, h, mean, rstd, weight, dtype, p: float, seed, need_dweight, need_dbias):
    rows, dus = as_rows(h), as_rows(du)
    dresiduals = None if dresidual is None else as_rows(dresidual)
    tokens, d = rows.shape
    if config.row_warps(rows) is None:
        return _gradients_one_after_the_other(
            du, dresidual, h, mean, rstd, weight, dtype, p, seed, need_dweight, need_dbias
        )
    dh = h.new_empty(h.shape)
    dy = h.new_empty(0 if dtype is None else h.shape, dtype=dtype)
    sums = [h.new_zeros(d if needed else 0, dtype=torch.float32) for needed in (need_dweight, need_dbias)]
    wanted = [own for own in sums if own.numel()]
    if tokens:
        programs, block, warps = config.row_programs(rows, bool(wanted))
        partials = h.new_empty(programs, len(wanted) * d, dtype=torch.float32) if wanted else None
        seed, threshold, keep_scale, constants = dropout_arguments(p, seed, d)
        launch(
            _sum_norm_backward_kernel, (programs,), dh, None if dtype is None else dy, partials, dus, dresiduals, rows,
            _contiguous(mean), rstd.contiguous(), weight.contiguous(), seed, tokens, d, dus.stride(0),
            0 if dresiduals is None else dresiduals.stride(0), rows.stride(0), threshold, keep_scale,
            WEIGHT=need_dweight, BIAS=need_dbias, QUADS=constants["QUADS"], BN=block, warps=warps, stages=1,
        )  # fmt: skip
        if wanted:
            sum_partials(partials, wanted)
    return dh, dy, *sums


def _one_after_the_other(y, residual, weight, bias, eps, p, seed, centred, room):
    h = dropout_add(y, residual, p, seed) if p else residual + y
    if centred:
        return h, *layer_norm(h, weight, bias, eps, room)
    u, rstd = rms_norm(h, weight, eps, room)
    return h, u, rstd.new_empty(0), rstd


def _gradients_one_after_the_other(
    du, dresidual, h, mean, rstd, weight, dtype, p, seed, need_dweight, need_dbias
):  # fmt: skip
    dbias = rstd.new_empty(0)
    if mean is None:
        dh, dweight = rms_norm_backward(du, h, rstd, weight, True, need_dweight)
    else:
        dh, dweight, dbias = layer_norm_backward(du, h, mean, rstd, weight, True, need_dweight, need_dbias)
    dh = dh if dresidual is None else dh.add_(dresidual)
    if dtype is None:
        return dh, h.new_empty(0), dweight, dbias
    return dh, dropout_add_backward(dh, dtype, p, seed) if p else dh.to(dtype, copy=True), dweight, dbias


def _contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


@triton.jit
def _dropped(values, seed, row, d, threshold, keep_scale, QUADS: tl.constexpr, BN: tl.constexpr):
    """drop() of one row that lies in registers."""
    if seed is not None:
        rows = row + tl.arange(0, 1)
        tile = drop(tl.reshape(values, (1, BN)), seed, rows, 0, d, threshold, keep_scale, QUADS)
        values = tl.reshape(tile, (BN,))
    return values


@triton.jit(do_not_specialize=["threshold"])
def _sum_norm_kernel(
    h, u, mean, rstd, y, residual, weight, bias, seed, d, stride_u, stride_y, stride_residual, eps, threshold,
    keep_scale,
    QUADS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    values = _dropped(read(y + row * stride_y, cols, d), seed, row, d, threshold, keep_scale, QUADS, BN)
    values += read(residual + row * stride_residual, cols, d)
    stored = values.to(h.dtype.element_ty)
    tl.store(h + row * d + cols, stored, mask=cols < d)
    values = stored.to(tl.float32)  # the norm reads what is stored
    zeros = tl.zeros((BN,), tl.float32)
    shift = 0.0
    if mean is not None:
        shift = tl.sum(values, 0) / d
    total, square = add_step(zeros, zeros, values, shift, cols, d)
    centre, r = statistics(total, square, shift, d, eps, mean is not None)
    if mean is not None:
        tl.store(mean + row, centre)
    tl.store(rstd + row, r)
    write_step(u + row * stride_u, values, centre, r, weight, bias, cols, d)


@triton.jit(do_not_specialize=["threshold"])
def _sum_norm_backward_kernel(
    dh, dy, partials, du, dresidual, h, mean, rstd, weight, seed, M, d, stride_du, stride_dresidual, stride_h,
    threshold, keep_scale, WEIGHT: tl.constexpr, BIAS: tl.constexpr, QUADS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BN)
    inside = cols < d
    gain = read(weight, cols, d)
    weight_sum = tl.zeros((BN,), tl.float32)
    bias_sum = tl.zeros((BN,), tl.float32)
    for index in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        centre = 0.0
        if mean is not None:
            centre = tl.load(mean + row)
        r = tl.load(rstd + row)
        grad = read(du + row * stride_du, cols, d)
        normalised = (read(h + row * stride_h, cols, d) - centre) * r
        g = grad * gain
        mean_g = 0.0
        if mean is not None:
            mean_g = tl.sum(g, 0) / d
        mean_gn = tl.sum(g * normalised, 0) / d
        stored = step_gradient(g, normalised, mean_g, mean_gn, r).to(dh.dtype.element_ty)
        if dresidual is not None:
            more = read(dresidual + row * stride_dresidual, cols, d)
            stored = (stored.to(tl.float32) + more).to(dh.dtype.element_ty)
        tl.store(dh + row * d + cols, stored, mask=inside)
        if dy is not None:
            dropped = _dropped(stored.to(tl.float32), seed, row, d, threshold, keep_scale, QUADS, BN)
            tl.store(dy + row * d + cols, dropped.to(dy.dtype.element_ty), mask=inside)
        if WEIGHT:
            weight_sum += grad * normalised
        if BIAS:
            bias_sum += grad
    if WEIGHT or BIAS:
        partials += tl.program_id(0) * (WEIGHT + BIAS) * d
        if WEIGHT:
            tl.store(partials + cols, weight_sum, mask=inside)
        if BIAS:
            tl.store(partials + WEIGHT * d + cols, bias_sum, mask=inside)
