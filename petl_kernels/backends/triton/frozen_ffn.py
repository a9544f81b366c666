"""frozen_ffn in Triton: the products are the library's, on chunks of rows; one launch does what lies between two.

Forward: activation, gate and the packed bits. Backward: the mask or the derivative, the gate, and the column sums for
dc1. Both work in place where nothing is kept. c1 is added in its product, before the sum is rounded: behind it, ReLU
would keep another sign than the sum has.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.activation import activate, derivative
from petl_kernels.backends.triton.common import as_rows, launch, load, store, sum_partials
from petl_kernels.backends.triton.frozen_linear import column_sums
from petl_kernels.ops.quantised import is_quantised, out_features, project, project_back


def frozen_ffn(x, w1, c1, w2, c2, gate, activation: str, keeps: str):
    rows = as_rows(x)
    tokens, f = rows.shape[0], out_features(w1, rows.shape[1])
    y = x.new_empty(rows.shape)
    bits = x.new_empty(tokens, config.cdiv(f, 8), dtype=torch.uint8) if keeps == "bits" else None
    z = x.new_empty(tokens, f) if keeps == "z" else None
    g = x.new_empty(tokens, f) if keeps == "z" and gate else None
    hidden = _chunk_like(rows, f)
    gates = torch.empty_like(hidden) if gate and keeps != "z" else None
    for part, chunk in _chunks(rows, f):
        h = hidden[chunk]
        z_rows = h if z is None else z[part]
        _multiply(rows[part], w1, c1, z_rows)
        g_rows = None if not gate else gates[chunk] if g is None else g[part]
        if gate:
            _multiply(rows[part], gate, None, g_rows)
        _activate_rows(h, None if bits is None else bits[part], z_rows, g_rows, activation)
        _multiply(h, w2, c2, y[part])
    kept = bits if bits is not None else z
    return y.view(x.shape), *(x.new_empty(0) if value is None else value for value in (kept, g))


def frozen_ffn_backward(
    dy, x, kept_z, kept_g, w1, c1, w2, gate, activation: str, keeps: str, need_dx, need_dc1, need_dc2
):  # fmt: skip
    rows = as_rows(dy)
    f = out_features(w1, rows.shape[1])
    x_rows = None if x is None else as_rows(x)
    dx = dy.new_empty(rows.shape if need_dx else 0)
    dc1 = dy.new_zeros(f if need_dc1 else 0, dtype=torch.float32)
    if need_dx or need_dc1:
        hidden = _chunk_like(rows, f)
        gates = torch.empty_like(hidden) if gate else None
        again = torch.empty_like(hidden) if keeps == "x" else None
        gates_again = torch.empty_like(hidden) if keeps == "x" and gate else None
    for part, chunk in _chunks(rows, f) if need_dx or need_dc1 else ():
        dz = _multiply_back(rows[part], w2, hidden[chunk])
        dg = gates[chunk] if gate else None
        bits = z = g = None
        if keeps == "bits":
            bits = kept_z[part]
        elif keeps == "z":
            z, g = kept_z[part], kept_g[part] if gate else None
        else:
            z = _multiply(x_rows[part], w1, c1, again[chunk])
            g = _multiply(x_rows[part], gate, None, gates_again[chunk]) if gate else None
        _activate_rows_backward(dz, dg, bits, z, g, dc1 if need_dc1 else None, activation)
        if need_dx:
            _multiply_back(dz, w1, dx[part])
            if gate:
                _multiply_back(dg, gate, dx[part], add=True)
    dc2 = column_sums(rows) if need_dc2 else dy.new_empty(0, dtype=torch.float32)
    return dx.view(dy.shape if need_dx else (0,)), dc1, dc2


def _multiply(rows, weight, bias, out) -> torch.Tensor:
    """out = rows Wᵀ + bias"""
    if is_quantised(weight):
        return out.copy_(project(rows, weight, bias, "triton"))
    if bias is None:
        return torch.mm(rows, weight[0].t(), out=out)
    return torch.addmm(bias, rows, weight[0].t(), out=out)


def _multiply_back(rows, weight, out, add: bool = False) -> torch.Tensor:
    """out = or += rows W"""
    if is_quantised(weight):
        product = project_back(rows, weight, "triton")
        return out.add_(product) if add else out.copy_(product)
    return out.addmm_(rows, weight[0]) if add else torch.mm(rows, weight[0], out=out)


def _chunks(rows: torch.Tensor, hidden: int) -> Iterator[tuple[slice, slice]]:
    """(the rows of a chunk, as many rows from 0)"""
    size = config.chunk_rows(rows, hidden)
    for first in range(0, rows.shape[0], size):
        stop = min(first + size, rows.shape[0])
        yield slice(first, stop), slice(0, stop - first)


def _chunk_like(rows: torch.Tensor, hidden: int) -> torch.Tensor:
    return rows.new_empty(config.chunk_rows(rows, hidden), hidden)


def _activate_rows(h, bits, z, g, activation: str) -> None:
    rows, f = z.shape
    tile = config.pointwise_tile(z)
    launch(
        _hidden_kernel, (config.cdiv(rows, tile.m), config.cdiv(f, tile.n)), h, bits, z, g, rows, f,
        config.cdiv(f, 8), ACTIVATION=activation, BM=tile.m, BN=tile.n,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _activate_rows_backward(dh, dg, bits, z, g, dc1, activation: str) -> None:
    """dh becomes dz; dc1 += Σ dz unless it is None."""
    rows, f = dh.shape
    tile = config.pointwise_tile(dh)
    tiles = config.cdiv(f, tile.n)
    splits = config.splits(dh, tile, tiles)
    partials = None if dc1 is None else dh.new_empty(splits, f, dtype=torch.float32)
    launch(
        _hidden_backward_kernel, (tiles, splits), dh, dg, partials, bits, z, g, rows, f, config.cdiv(f, 8),
        ACTIVATION=activation, BM=tile.k, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if dc1 is not None:
        sums = torch.empty_like(dc1)
        sum_partials(partials, [sums])
        dc1 += sums


@triton.jit
def _hidden_kernel(
    h, bits, z, g, M, f, width, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """h = act(z) [⊙ g] for one tile; which z are positive, eight to a byte."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < f
    at = rows[:, None] * f + cols[None, :]
    value = load(z + at, row_inside, col_inside).to(tl.float32)
    if bits is not None:
        positive = ((value > 0) & col_inside[None, :]).to(tl.int32)
        shifts = tl.arange(0, 8)[None, None, :]
        packed = tl.sum(tl.reshape(positive, (BM, BN // 8, 8)) << shifts, 2)
        byte = tl.program_id(1) * (BN // 8) + tl.arange(0, BN // 8)
        store(bits + rows[:, None] * width + byte[None, :], packed, row_inside, byte < width)
    out = activate(value, ACTIVATION)
    if g is not None:
        out *= load(g + at, row_inside, col_inside).to(tl.float32)
    store(h + at, out, row_inside, col_inside)


@triton.jit
def _hidden_backward_kernel(
    dh, dg, partials, bits, z, g, M, f, width, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """dz in place of dh, dg, and this split's part of Σ dz, for a block of columns and a part of the rows."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_inside = cols < f
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    stop = min((split + 1) * length, M)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(split * length, stop, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_inside = rows < stop
        at = rows[:, None] * f + cols[None, :]
        grad = load(dh + at, row_inside, col_inside).to(tl.float32)
        if bits is not None:
            byte = tl.load(
                bits + rows[:, None] * width + (cols // 8)[None, :],
                mask=row_inside[:, None] & col_inside[None, :],
                other=0,
            )
            grad = tl.where((byte.to(tl.int32) >> (cols % 8)[None, :]) & 1 != 0, grad, 0.0)
        else:
            value = load(z + at, row_inside, col_inside).to(tl.float32)
            if g is not None:
                store(dg + at, grad * activate(value, ACTIVATION), row_inside, col_inside)
                grad *= load(g + at, row_inside, col_inside).to(tl.float32)
            grad *= derivative(value, ACTIVATION)
        store(dh + at, grad, row_inside, col_inside)
        acc += tl.sum(grad, 0)
    if partials is not None:
        tl.store(partials + split * f + cols, acc, mask=col_inside)
