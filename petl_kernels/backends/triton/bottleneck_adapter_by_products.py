"""bottleneck_adapter for a wide bottleneck: the library multiplies, two products forward and five backward.

Backward makes LN(x) and z again. A pass over the rows writes LN(x), and forward the summand of the second product, res
+ scale u; a pass over the hidden units turns dy U into dz. Beside inputs and outputs that takes (tokens, d) once and
(tokens, m) twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from petl_kernels.backends.products import in_dtype, product_in_fp32
from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.activation import activate, activate_rows, derivative
from petl_kernels.backends.triton.common import launch, load, store, sum_partials
from petl_kernels.backends.triton.frozen_linear import column_sums
from petl_kernels.backends.triton.layer_norm import add_step, layer_norm, norm_backward, read, statistics, write_step


def forward(
    x, res, ln_weight, ln_bias, down, down_bias, up, up_bias, eps, activation, scale
) -> torch.Tensor:  # fmt: skip
    if ln_weight is None or not config.whole_rows(x):
        h = x if ln_weight is None else layer_norm(x, ln_weight, ln_bias, eps)[0].to(x.dtype)
        y = res.clone() if up_bias is None else res + scale * up_bias.to(x.dtype)
    else:
        h, y = x.new_empty(2, *x.shape)
        _launch_rows(h, None, None, y, x, res, ln_weight, ln_bias, up_bias, eps, scale)
    down, down_bias, up = in_dtype(x.dtype, down, down_bias, up)
    a = _hidden(h, down, down_bias, activation)
    if activation != "relu":
        activate_rows(a, None, a, activation)
    return y.addmm_(a, up.t(), alpha=scale)


def backward(
    dy, x, residual_is_x, ln_weight, ln_bias, down, down_bias, up, eps, activation, scale, need_dx, has_up_bias
) -> tuple[Any, ...]:  # fmt: skip
    h, mean, rstd = _normalised_again(x, ln_weight, ln_bias, eps)
    down, down_bias, up = in_dtype(x.dtype, down, down_bias, up)
    a = _hidden(h, down, down_bias, activation)  # z, but for a ReLU, until the pass over dz
    dz = torch.mm(dy, up)
    ddown_bias = _activate_backward(a, dz, activation, scale)
    dup = product_in_fp32(dy.t(), a)
    dup = dup if scale == 1 else dup.mul_(scale)
    ddown = product_in_fp32(dz.t(), h)
    if ln_weight is None:
        dup_bias = scale * column_sums(dy) if has_up_bias else None
        dx = None
        if need_dx:
            dx = dy.clone().addmm_(dz, down) if residual_is_x else torch.mm(dz, down)
        return dx, None, None, ddown, ddown_bias, dup, dup_bias
    dh = torch.mm(dz, down, out=h)
    found = _norm_backward(dh, dy, x, mean, rstd, residual_is_x, ln_weight, ln_bias, scale, need_dx, has_up_bias)
    dx, dln_weight, dln_bias, dup_bias = found
    return dx, dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias


def _hidden(h, down, down_bias, activation: str) -> torch.Tensor:
    """Returns z = h Dᵀ + d, or act(z) for a ReLU."""
    if down_bias is None:
        down_bias = h.new_zeros(down.shape[0])
    if activation == "relu":
        return torch._addmm_activation(down_bias, h, down.t())  # pyright: ignore[reportPrivateImportUsage]
    return torch.addmm(down_bias, h, down.t())


def _normalised_again(x, ln_weight, ln_bias, eps):
    """Returns (LN(x), mean, rstd), or (x, None, None) without a LayerNorm."""
    if ln_weight is None:
        return x, None, None
    if not config.whole_rows(x):
        h, mean, rstd = layer_norm(x, ln_weight, ln_bias, eps)
        return h.to(x.dtype), mean, rstd
    h, (mean, rstd) = x.new_empty(x.shape), x.new_empty(2, x.shape[0], dtype=torch.float32)
    _launch_rows(h, mean, rstd, None, x, None, ln_weight, ln_bias, None, eps, 1.0)
    return h, mean, rstd


def _launch_rows(h, mean, rstd, y, x, res, ln_weight, ln_bias, up_bias, eps, scale) -> None:
    vectors = (None if vector is None else vector.contiguous() for vector in (ln_weight, ln_bias, up_bias))
    block, warps = config.row_block(x)
    launch(
        _rows_kernel, (x.shape[0],), h, mean, rstd, y, x, res, *vectors, x.shape[1], x.stride(0),
        0 if res is None else res.stride(0), eps, scale, BN=block, warps=warps, stages=1,
    )  # fmt: skip


def _norm_backward(dh, dy, x, mean, rstd, residual_is_x, ln_weight, ln_bias, scale, need_dx, has_up_bias):
    """Returns (dx, dw, dv, scale Σ dy)."""
    in_one_pass = need_dx and residual_is_x and config.whole_rows(x)
    dx, _, dln_weight, dln_bias, dup_bias = norm_backward(
        dh, x, mean, rstd, ln_weight, need_dx, True, ln_bias is not None, dy if in_one_pass else None,
        need_residual_sum=in_one_pass and has_up_bias,
    )  # fmt: skip
    if not in_one_pass:
        dx = dx.add_(dy) if need_dx and residual_is_x else dx
        dup_bias = column_sums(dy) if has_up_bias else None
    return dx, dln_weight, dln_bias, scale * dup_bias if has_up_bias else None


def _activate_backward(a, dz, activation: str, scale: float) -> torch.Tensor:
    """Overwrites dy U in ``dz`` with dz, and z in ``a`` with act(z), which a ReLU's is already; returns Σ dz."""
    rows, m = dz.shape
    tile = config.latent_tile(dz)
    tiles = config.cdiv(m, tile.n)
    splits = max(1, min(config.cdiv(rows, tile.m), 4 * config.processors(dz.device) // tiles))
    partials, sums = dz.new_empty(splits, m, dtype=torch.float32), dz.new_empty(m, dtype=torch.float32)
    launch(
        _latent_gradient_kernel, (tiles, splits), a, dz, partials, rows, m, scale, ACTIVATION=activation,
        BM=tile.m, BN=tile.n, warps=tile.warps, stages=1,
    )  # fmt: skip
    sum_partials(partials, [sums])
    return sums


@triton.jit
def _rows_kernel(
    h, mean, rstd, y, x, res, weight, bias, up_bias, d, stride_x, stride_res, eps, scale, BN: tl.constexpr
):  # fmt: skip
    """Writes h = LN(x) of one row; and its statistics, or y = res + scale u, where their pointers are given."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    values = read(x + row * stride_x, cols, d)
    if y is not None:
        out = read(res + row * stride_res, cols, d)
        if up_bias is not None:
            out += scale * read(up_bias, cols, d)
        tl.store(y + row * d + cols, out.to(y.dtype.element_ty), mask=cols < d)
    zeros = tl.zeros((BN,), tl.float32)
    shift = tl.sum(values, 0) / d
    total, square = add_step(zeros, zeros, values, shift, cols, d)
    centre, r = statistics(total, square, shift, d, eps, True)
    write_step(h + row * d, values, centre, r, weight, bias, cols, d)
    if mean is not None:
        tl.store(mean + row, centre)
        tl.store(rstd + row, r)


@triton.jit
def _latent_gradient_kernel(
    a, dz, partials, M, m, scale, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Writes dz = scale (dy U) act'(z) in the place of dy U, act(z) in that of z, and this split's part of Σ dz."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_inside = cols < m
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(split * BM, M, splits * BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_inside, at = rows < M, rows[:, None] * m + cols[None, :]
        z = load(a + at, row_inside, col_inside).to(tl.float32)
        gradient = scale * load(dz + at, row_inside, col_inside).to(tl.float32) * derivative(z, ACTIVATION)
        gradient = gradient.to(dz.dtype.element_ty)
        store(dz + at, gradient, row_inside, col_inside)
        if ACTIVATION != "relu":
            store(a + at, activate(z, ACTIVATION), row_inside, col_inside)
        acc += gradient.to(tl.float32)
    tl.store(partials + split * m + cols, tl.sum(acc, 0), mask=col_inside)
