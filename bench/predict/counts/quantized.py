"""Counts of products with quantized weights, and of conversions."""

from __future__ import annotations

import math

import torch

from bench.predict.counts.tables import LOOP_ROWS, QUANTIZED, VECTOR_ROWS, padded
from bench.predict.counts.work import FP32, PROCESSORS, Counts, Launch, library_product
from petl_kernels.ops.quantized import CUDA_TILE_BYTES, storage_bytes

# Instructions a thread spends on each value of a weight, by storage, counted for sm_90: forward and dx.
LOOP = {"int8": (8.4, 8.8), "nf4": (21, 21)}
ALONE = {"int8": (10.6, 18), "nf4": (13.8, 23)}
DEQUANTIZE = {"int8": 8.5, "nf4": 17.1}
QUANTIZE = {"int8": 26, "nf4": 54}


def quantized_project(t: int, n: int, k: int, storage: str, size: int) -> Counts:
    """x Ŵᵀ and dy Ŵ, without a bias.

    Ŵ is dequantized for each of a few rows, in the main loop, or ahead of the library's product.
    """
    weight = stored_bytes(n, k, storage)
    moved = size * 2 * (t * k + t * n) + 2 * weight
    in_loop = k % 64 == 0 and t <= LOOP_ROWS[storage]
    alone = k % 64 == 0 and t <= VECTOR_ROWS
    product = _quantized_alone if alone else _quantized_loop if in_loop else _quantized_ahead
    kernels = (
        *product("_quantized_project_kernel", 0, t, n, k, storage, size, weight),
        *product("_quantized_project_back_kernel", 1, t, k, n, storage, size, weight),
    )
    return Counts(4 * t * n * k, moved, kernels)


def _quantized_alone(_, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    """No products of tiles: multiplications are among the instructions."""
    name = ("_project_rows_kernel", "_project_back_rows_kernel")[direction]
    work = ALONE[storage][direction] * t * cols * inner
    return [Launch(name, bytes=size * t * (inner + cols) + weight, instructions=work)]


def _quantized_loop(name, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    rows = padded(t, QUANTIZED.m)
    tiles = math.ceil(t / rows)
    wanted = math.ceil(2 * PROCESSORS / (tiles * math.ceil(cols / QUANTIZED.n)))
    splits = max(1, min(wanted, inner // ((2 if rows == 16 else 4) * QUANTIZED.k)))
    parts = FP32 * splits * t * cols if splits > 1 else size * t * cols
    work = LOOP[storage][direction] * tiles * cols * inner
    kernels = [Launch(name, 2 * t * cols * inner, size * t * inner + weight + parts, work)]
    return kernels + ([Launch("_sum_kernel", bytes=parts + size * t * cols)] if splits > 1 else [])


def _quantized_ahead(_, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    most = max(1, CUDA_TILE_BYTES // (inner * size))
    most = most // 64 * 64 or most
    length = math.ceil(cols / math.ceil(cols / most))
    length = max(1, min(math.ceil(length / 64) * 64, most))
    kernels = []
    for first in range(0, cols, length):
        part = min(length, cols - first)
        values = part * inner
        moved = weight * part // cols + size * values
        kernels.append(Launch("_dequantize_kernel", bytes=moved, instructions=DEQUANTIZE[storage] * values))
        kernels.append(library_product(t, part, inner, size))
    return kernels


def stored_bytes(n: int, k: int, storage: str) -> int:
    return storage_bytes((n, k), storage, torch.bfloat16)


def quantize(n: int, k: int, storage: str, size: int) -> Counts:
    """A dense weight into a storage, with the look whether its values are finite."""
    moved, look = n * k * size + stored_bytes(n, k, storage), Launch("largest scale", library=True)
    if storage == "int8":
        kernel = Launch("_quantize_int8_kernel", bytes=moved, instructions=QUANTIZE["int8"] * n * k)
        return Counts(0, moved, (kernel, look))
    blocks = math.ceil(n * k / 64)
    codes = n * k * size + math.ceil(n * k / 2) + FP32 * blocks
    kernels = (
        Launch("_quantize_nf4_kernel", bytes=codes, instructions=QUANTIZE["nf4"] * n * k),
        Launch("mean", bytes=FP32 * blocks, library=True),
        Launch("cast of the mean", library=True),
        Launch("_quantize_absmax_kernel", bytes=(FP32 + 1) * blocks),
        look,
    )
    return Counts(0, moved, kernels)


def dequantize(n: int, k: int, storage: str, size: int) -> Counts:
    """A weight in a storage into a dense one."""
    moved = n * k * size + stored_bytes(n, k, storage)
    return Counts(0, moved, (Launch("_dequantize_kernel", bytes=moved, instructions=DEQUANTIZE[storage] * n * k),))
