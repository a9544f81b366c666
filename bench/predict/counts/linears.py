"""Counts of frozen linears, and of linears with LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bench.predict.counts.tables import FUSED_RANKS, GRADIENT_TOKENS, TOKEN_PARTS
from bench.predict.counts.work import FP32, MASK, Counts, Launch, added_product, library_product
from petl_kernels.ops.lora_border import ALIGNMENT, CUDA_PARTS


def frozen_linear(t: int, n: int, k: int, size: int, bias: bool = True, dbias: bool = False) -> Counts:
    """y = x Wᵀ + c, dx = dy W, both the library's, and dc where the bias is trained: the limit of every linear."""
    moved = size * (2 * t * k + 2 * t * n + 2 * n * k + (n if bias else 0)) + (FP32 * n if dbias else 0)
    kernels = [library_product(t, n, k, size), library_product(t, k, n, size)]
    if dbias:
        kernels.append(Launch("_column_sums_kernel", bytes=t * n * size))
        kernels.append(Launch("_sum_kernel", bytes=FP32 * TOKEN_PARTS * n))
    return Counts(4 * t * n * k, moved, tuple(kernels))


def lora_linear(
    t: int, k: int, outputs: Sequence[int], ranks: Sequence[int], size: int, dropout: bool = False
) -> Counts:
    """Counts linears (N_g, k) with adapters of rank r_g that read one x: 4·t·k·N + 6·t·(k·R + Σ N_g·r_g)."""
    n, r = sum(outputs), sum(ranks)
    a, b = r * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    x, y, s, w, adapters = t * k * size, t * n * size, t * r * size, n * k * size, FP32 * (a + b)
    mask = MASK * t * k if dropout else 0.0
    forward = x + w + n * size + adapters + y + s
    backward = y + x + s + w + adapters + x + adapters
    rank_part = _rank_part if r <= FUSED_RANKS else _rank_part_apart
    kernels = (
        *rank_part("_rank_outputs_kernel", "_project_kernel", t, k, outputs, ranks, size, mask),
        *(added_product(t, n_g, k, size) for n_g in outputs),
        *rank_part("_rank_input_kernel", "_rank_gradients_kernel", t, k, outputs, ranks, size, mask),
        *(added_product(t, k, n_g, size) for n_g in outputs),
        Launch("_adapter_gradients_kernel", 2 * t * (a + b), y + x + 2 * s + TOKEN_PARTS * adapters, mask),
        Launch("_sum_kernel", bytes=(TOKEN_PARTS + 1) * adapters),
    )
    return Counts(4 * t * n * k + 6 * t * (a + b), forward + backward, kernels)


def _rank_part(fused, _alone, t, k, outputs, ranks, size, mask) -> list[Launch]:
    """Returns the launch of s and the rank part of y, or of ds and that of dx, from one read of x or dy."""
    n, r = sum(outputs), sum(ranks)
    a, b = r * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    return [Launch(fused, 2 * t * (a + b), size * t * (k + n + r) + FP32 * (a + b), mask)]


def _rank_part_apart(fused, alone, t, k, outputs, ranks, size, mask) -> list[Launch]:
    """Returns the same where the ranks are too many: s or ds, then the library's products, without casts and scales."""
    r, into = sum(ranks), fused == "_rank_outputs_kernel"
    b = sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    if into:
        first = Launch(alone, 2 * t * r * k, size * t * (k + r) + FP32 * r * k, mask)
        return [first, *(library_product(t, n_g, r_g, size) for n_g, r_g in zip(outputs, ranks, strict=True))]
    first = Launch(alone, 2 * t * b, size * t * (sum(outputs) + r) + FP32 * b)
    written = [Launch("library pass", bytes=2 * t * k * size, library=True)]
    dropped = [Launch("_dropout_add_kernel", bytes=2 * t * k * size, instructions=mask)] if mask else []
    return [first, library_product(t, k, r, size), *dropped, *written]


def lora_border(t: int, k: int, outputs: Sequence[int], ranks: Sequence[int], size: int) -> Counts:
    """Counts the same as one product each way, r_g = 0 where there is no adapter; x and dy come in rows with room."""
    n, r = sum(outputs), math.ceil(sum(ranks) / ALIGNMENT) * ALIGNMENT
    a, b = sum(ranks) * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    counted = lora_linear(t, k, outputs, ranks, size)
    if not r:
        products = library_product(t, n, k, size), library_product(t, k, n, size)
        return replace(counted, kernels=(_filled(n, size), *products))
    x, s, adapters = t * k * size, t * sum(ranks) * size, FP32 * (a + b)
    read = size * t * sum(n_g for n_g, r_g in zip(outputs, ranks, strict=True) if r_g)
    blocks = math.ceil(t / GRADIENT_TOKENS)
    parts = min(blocks, CUDA_PARTS)
    written = FP32 * (2 * blocks - parts) * b  # all blocks but a part's first are added to what is there
    kernels = (
        Launch("_inputs_kernel", 2 * t * a, x + 2 * s + adapters + n * r * size),
        library_product(t, n, k + r, size),
        Launch("_gradients_kernel", 4 * t * b, read + 2 * s + adapters + r * k * size + written),
        Launch("_sum_kernel", bytes=FP32 * (parts + 1) * b),
        Launch("_token_sum_kernel", 2 * t * a, x + s + FP32 * TOKEN_PARTS * a),
        Launch("_sum_kernel", bytes=FP32 * (TOKEN_PARTS + 1) * a),
        library_product(t, k, n + r, size),
    )
    return replace(counted, kernels=kernels)


def _filled(n: int, size: int) -> Launch:
    return Launch("_inputs_kernel", bytes=2 * n * size)
