"""dropout_add_norm in Triton: h = residual + drop(y) and u = norm(h) in one launch, and the gradients of both in one.

Forward a program holds a row in registers, up to 32 columns a thread, so that a row of 1024 is one warp's own and its
sums cross no other. Backward is the norm's own pass (layer_norm.py), which takes the residual's gradient and drops.
Memory is read once and written once: 8 bytes an element forward and 10 backward in 16 bit. A row that is too long for
one program takes the kernels of the two ops, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, drop, dropout_arguments, launch
from petl_kernels.backends.triton.dropout_add import dropout_add, dropout_add_backward
from petl_kernels.backends.triton.layer_norm import (
    add_step,
    contiguous,
    layer_norm,
    norm_backward,
    read,
    statistics,
    write_step,
)
from petl_kernels.backends.triton.registry import serves, serves_with_room
from petl_kernels.backends.triton.rms_norm import rms_norm
from petl_kernels.ops.room import roomy


@serves_with_room
def dropout_add_norm(y, residual, weight, bias, eps: float, p: float, seed, centred: bool, room: int = 0):
    rows, residuals = as_rows(y), as_rows(residual)
    tokens, d = rows.shape
    if not config.whole_rows(rows):
        return _one_after_the_other(y, residual, weight, bias, eps, p, seed, centred, room)
    h = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, residual.dtype))
    u = roomy(y, y.shape, room, torch.promote_types(h.dtype, weight.dtype))
    rstd = y.new_empty(y.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    if tokens:
        block, warps = config.row_block(rows)
        seed, threshold, keep_scale, _ = dropout_arguments(p, seed)
        launch(
            _sum_norm_kernel, (tokens,), h, u, mean, rstd, rows, residuals, weight.contiguous(), contiguous(bias),
            seed, d, d + room, rows.stride(0), residuals.stride(0), eps, threshold, keep_scale,
            BN=block, warps=warps, stages=1,
        )  # fmt: skip
    return h, u, mean if centred else rstd.new_empty(0), rstd


@serves
def dropout_add_norm_backward(du, dresidual, h, mean, rstd, weight, dtype, p: float, seed, need_dweight, need_dbias):
    given = (du, h, mean, rstd, weight, True, need_dweight, need_dbias)
    if config.whole_rows(as_rows(h)):
        return norm_backward(*given, dresidual, dtype, p, seed)[:4]
    dh, _, *sums, _ = norm_backward(*given)
    dh = dh if dresidual is None else dh.add_(dresidual)
    if dtype is None:
        return dh, h.new_empty(0), *sums
    return dh, dropout_add_backward(dh, dtype, p, seed) if p else dh.to(dtype, copy=True), *sums


def _one_after_the_other(y, residual, weight, bias, eps, p, seed, centred, room):
    h = dropout_add(y, residual, p, seed) if p else residual + y
    if centred:
        return h, *layer_norm(h, weight, bias, eps, room)
    u, rstd = rms_norm(h, weight, eps, room)
    return h, u, rstd.new_empty(0), rstd


@triton.jit
def _dropped(values, seed, row, d, threshold, keep_scale, BN: tl.constexpr):
    """Returns one row, which is in registers, after dropout."""
    if seed is not None:
        rows = row + tl.arange(0, 1)
        tile = drop(tl.reshape(values, (1, BN)), seed, rows, 0, d, threshold, keep_scale)
        values = tl.reshape(tile, (BN,))
    return values


@triton.jit(do_not_specialize=["threshold"])
def _sum_norm_kernel(
    h, u, mean, rstd, y, residual, weight, bias, seed, d, stride_u, stride_y, stride_residual, eps, threshold,
    keep_scale,
    BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    values = _dropped(read(y + row * stride_y, cols, d), seed, row, d, threshold, keep_scale, BN)
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
