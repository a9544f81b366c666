"""activation in Triton: y = drop(act(z)) and dz = drop(dy) act'(z), with one bit an element kept for relu.

Bound by memory: z in, y out (and an eighth of a byte an element), 4 bytes an element in 16 bit; backward the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows, drop, dropout_arguments, launch, load, store
from petl_kernels.backends.triton.registry import serves


@serves
def activation(
    z: torch.Tensor, kind: str, dropout: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = as_rows(z)
    tokens, features = rows.shape
    y = rows.new_empty(tokens, features)
    bits = rows.new_empty((tokens, config.cdiv(features, 8)) if kind == "relu" else (0,), dtype=torch.uint8)
    activate_rows(y, bits, rows, kind, dropout, seed)
    return y.view(z.shape), bits


def activate_rows(y, bits, rows, kind: str, dropout: float = 0.0, seed: torch.Tensor | None = None) -> None:
    """Writes drop(act(rows)) into y, and a ReLU's bits; y may be ``rows``."""
    if rows.numel():
        tokens, features = rows.shape
        tile = config.elementwise_tile(rows)
        seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
        launch(
            _activation_kernel, tile.grid(rows), y, bits, rows, seed, tokens, features, rows.stride(0),
            threshold, keep_scale, ACTIVATION=kind, **constants, BM=tile.m, BN=tile.n, warps=tile.warps, stages=1,
        )  # fmt: skip


@serves
def activation_backward(
    dy: torch.Tensor, saved: torch.Tensor, kind: str, dropout: float, seed: torch.Tensor | None
) -> torch.Tensor:
    rows = as_rows(dy)
    dz = rows.new_empty(rows.shape)
    saved = saved.contiguous() if kind == "relu" else as_rows(saved)
    activate_rows_backward(dz, rows, saved, kind, dropout, seed)
    return dz.view(dy.shape)


def activate_rows_backward(dz, rows, saved, kind: str, dropout: float = 0.0, seed: torch.Tensor | None = None) -> None:
    """Writes drop(rows) act'(z) into dz, from z or from a ReLU's bits; dz may be ``rows``."""
    if rows.numel():
        tokens, features = rows.shape
        tile = config.elementwise_tile(rows)
        seed, threshold, keep_scale, constants = dropout_arguments(dropout, seed)
        launch(
            _activation_backward_kernel, tile.grid(rows), dz, rows, saved, seed, tokens, features, rows.stride(0),
            saved.stride(0), threshold, keep_scale, ACTIVATION=kind, **constants, BM=tile.m, BN=tile.n,
            warps=tile.warps, stages=1,
        )  # fmt: skip


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        return z * tl.sigmoid(z)


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # 1 - gate as the gate of the other side: the difference would lose what the slope, up to z², brings out again.
        inner = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * z * z)
        return tl.sigmoid(inner) * (1.0 + z * tl.sigmoid(-inner) * slope)
    else:
        gate = tl.sigmoid(z)
        return gate * (1.0 + z * (1.0 - gate))


@triton.jit
def store_bits(bits, positive, rows, first, N, row_inside):
    """Packs zeros and ones (BM, BN), whose columns start at ``first`` of rows of N, into the bits of those rows."""
    BM: tl.constexpr = positive.shape[0]
    BN: tl.constexpr = positive.shape[1]
    flags = tl.reshape(positive, (BM, BN // 8, 8))
    packed = tl.sum(flags << tl.arange(0, 8)[None, None, :], 2)
    row_bytes = tl.cdiv(N, 8)
    places = first // 8 + tl.arange(0, BN // 8)
    store(bits + rows[:, None] * row_bytes + places[None, :], packed, row_inside, places < row_bytes)


@triton.jit(do_not_specialize=["threshold"])
def _activation_kernel(
    y, bits, z, seed, M, N, stride_z, threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    first = tl.program_id(1) * BN
    cols = first + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < N
    tile = load(z + rows[:, None] * stride_z + cols[None, :], row_inside, col_inside)
    value = activate(tile.to(tl.float32), ACTIVATION)
    if DROPOUT:
        value = drop(value, seed, rows, first, N, threshold, keep_scale)
    store(y + rows[:, None] * N + cols[None, :], value, row_inside, col_inside)
    if ACTIVATION == "relu":
        # Outside, where the tile is 0, the bits are too.
        store_bits(bits, tl.where(tile <= 0, 0, 1), rows, first, N, row_inside)


@triton.jit(do_not_specialize=["threshold"])
def _activation_backward_kernel(
    dz, dy, saved, seed, M, N, stride_dy, stride_saved, threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    first = tl.program_id(1) * BN
    cols = first + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < N
    grad = load(dy + rows[:, None] * stride_dy + cols[None, :], row_inside, col_inside).to(tl.float32)
    if DROPOUT:
        grad = drop(grad, seed, rows, first, N, threshold, keep_scale)
    if ACTIVATION == "relu":
        places = first // 8 + tl.arange(0, BN // 8)
        packed = load(saved + rows[:, None] * stride_saved + places[None, :], row_inside, places < tl.cdiv(N, 8))
        flags = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        grad = tl.where(tl.reshape(flags, (BM, BN)) == 0, 0.0, grad)
    else:
        z = load(saved + rows[:, None] * stride_saved + cols[None, :], row_inside, col_inside)
        grad *= derivative(z.to(tl.float32), ACTIVATION)
    store(dz + rows[:, None] * N + cols[None, :], grad, row_inside, col_inside)
