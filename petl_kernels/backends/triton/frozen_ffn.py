"""frozen_ffn in Triton: the products are the library's; what lies between two is a pass of the activation's kernels.

A ReLU without a gate is applied by its product, and a pass over h packs which of it is positive, where the product has
not done it as well (cuBLASLt's can); backward, the mask is applied in place. With other activations and gates one pass
makes h of the pre-activations, in their place where they are not kept, and one dz of dh. c1 is added in its product,
before the sum is rounded: behind it, ReLU would keep another sign than the sum has.

h (tokens, f) exists as a whole where it takes no more than 64 MiB (``ops/frozen_ffn.py``), else in chunks of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from petl_kernels.backends.products import PyTorchProducts
from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.activation import activate_rows, activate_rows_backward, store_bits
from petl_kernels.backends.triton.common import as_rows, launch, load, store
from petl_kernels.backends.triton.frozen_linear import column_sums
from petl_kernels.backends.triton.gated_activation import gate_rows, gate_rows_backward
from petl_kernels.backends.triton.quantized import quantized_project, quantized_project_back
from petl_kernels.backends.triton.registry import serves
from petl_kernels.ops.quantized import is_quantized, out_features


@serves
def frozen_ffn(x, w1, c1, w2, c2, gate, activation: str, keeps: str, products=PyTorchProducts):
    multiply = functools.partial(_multiply, products)
    rows = as_rows(x)
    tokens, f = rows.shape[0], out_features(w1, rows.shape[1])
    y = x.new_empty(rows.shape)
    bits = _empty_bits(rows, f) if keeps == "bits" else None
    z = x.new_empty(tokens, f) if keeps == "z" else None
    g = x.new_empty(tokens, f) if keeps == "z" and gate else None
    hidden = _chunk_like(rows, f)
    gates: Any = torch.empty_like(hidden) if gate and keeps != "z" else None
    for part, chunk in _chunks(rows, f):
        h = hidden[chunk]
        if activation == "relu" and not gate:
            _rectified(products, rows[part], w1, c1, h, None if bits is None else bits[part])
        else:
            z_rows = multiply(rows[part], w1, c1, h if z is None else z[part])
            if gate:
                g_rows = multiply(rows[part], gate, None, gates[chunk] if g is None else g[part])
                gate_rows(h, z_rows, g_rows, activation)
            else:
                activate_rows(h, None, z_rows, activation)
        multiply(h, w2, c2, y[part])
    kept = bits if bits is not None else z
    return y.view(x.shape), *(x.new_empty(0) if value is None else value for value in (kept, g))


@serves
def frozen_ffn_backward(
    dy, x, kept_z, kept_g, w1, c1, w2, gate, activation: str, keeps: str, need_dx, need_dc1, need_dc2,
    products=PyTorchProducts,
):  # fmt: skip
    multiply, multiply_back = functools.partial(_multiply, products), functools.partial(_multiply_back, products)
    rows = as_rows(dy)
    f = out_features(w1, rows.shape[1])
    x_rows: Any = None if x is None else as_rows(x)
    dx = dy.new_empty(rows.shape if need_dx else 0)
    dc1 = dy.new_zeros(f if need_dc1 else 0, dtype=torch.float32)
    wanted = need_dx or need_dc1
    hidden: Any = _chunk_like(rows, f) if wanted else None
    again: Any = torch.empty_like(hidden) if wanted and keeps == "x" else None
    gates: Any = torch.empty_like(hidden) if wanted and gate else None
    for part, chunk in _chunks(rows, f) if wanted else ():
        dz, dg = multiply_back(rows[part], w2, hidden[chunk]), gates[chunk] if gate else None
        if activation == "relu" and not gate:
            bits = kept_z[part] if keeps == "bits" else _empty_bits(dz, f)
            if keeps == "x":
                _rectified(products, x_rows[part], w1, c1, again[chunk], bits)
            activate_rows_backward(dz, dz, bits, activation)
        else:
            z = kept_z[part] if keeps == "z" else multiply(x_rows[part], w1, c1, again[chunk])
            if gate:
                g = kept_g[part] if keeps == "z" else multiply(x_rows[part], gate, None, dg)
                gate_rows_backward(dz, dg, dz, z, g, activation)
            else:
                activate_rows_backward(dz, dz, z, activation)
        if need_dc1:
            dc1 += column_sums(dz)
        if need_dx:
            multiply_back(dz, w1, dx[part])
            if gate:
                multiply_back(dg, gate, dx[part], add=True)
    dc2 = column_sums(rows) if need_dc2 else dy.new_empty(0, dtype=torch.float32)
    return dx.view(dy.shape if need_dx else (0,)), dc1, dc2


def _rectified(products, rows, weight, bias, h, bits) -> None:
    """Writes relu(rows Wᵀ + bias) into h, and the positive places of h into bits unless they are None."""
    by_product, packed = not is_quantized(weight), False
    if by_product:
        packed = products.relu_linear(rows, weight[0], bias, h, bits)
    else:
        _multiply(products, rows, weight, bias, h)
    if h.numel() and not (by_product and (packed or bits is None)):
        tile = config.elementwise_tile(h)
        launch(
            _positive_kernel, tile.grid(h), h, bits, *h.shape, RELU=not by_product, BM=tile.m, BN=tile.n,
            warps=tile.warps, stages=1,
        )  # fmt: skip


def _multiply(products, rows, weight, bias, out) -> torch.Tensor:
    """Writes rows Wᵀ + bias into out."""
    if is_quantized(weight):
        return quantized_project(rows, weight, bias, out)
    return products.linear(rows, weight[0], bias, out)


def _multiply_back(products, rows, weight, out, add: bool = False) -> torch.Tensor:
    """Writes rows W into out, or adds it."""
    if is_quantized(weight):
        return out.add_(quantized_project_back(rows, weight)) if add else quantized_project_back(rows, weight, out)
    return products.multiply(rows, weight[0], out, add)


def _chunks(rows: torch.Tensor, hidden: int) -> Iterator[tuple[slice, slice]]:
    """Yields the rows of each chunk, and as many rows from 0 on."""
    size = config.chunk_rows(rows, hidden)
    for first in range(0, rows.shape[0], size):
        stop = min(first + size, rows.shape[0])
        yield slice(first, stop), slice(0, stop - first)


def _chunk_like(rows: torch.Tensor, hidden: int) -> torch.Tensor:
    return rows.new_empty(config.chunk_rows(rows, hidden), hidden)


def _empty_bits(rows: torch.Tensor, hidden: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], config.cdiv(hidden, 8), dtype=torch.uint8)


@triton.jit
def _positive_kernel(h, bits, M, N, RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Writes which of h are positive, eight to a byte; with RELU h holds z, and relu(z) takes its place."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    first = tl.program_id(1) * BN
    cols = first + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < N
    at = rows[:, None] * N + cols[None, :]
    tile = load(h + at, row_inside, col_inside)
    if RELU:
        store(h + at, tl.where(tile <= 0, 0.0, tile), row_inside, col_inside)
    if bits is not None:
        store_bits(bits, tl.where(tile > 0, 1, 0), rows, first, N, row_inside)
