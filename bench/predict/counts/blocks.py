"""Counts of adapters, feed-forward blocks and the vocabulary loss."""

from __future__ import annotations

import math

import torch

from bench.predict.counts.elementwise import ACTIVATION
from bench.predict.counts.tables import ADAPTER_FUSED, ROW_PARTS, TOKEN_PARTS
from bench.predict.counts.work import FP32, PROCESSORS, Counts, Launch, added_product, library_product
from petl_kernels.ops.frozen_ffn import chunk_rows
from petl_kernels.ops.linear_cross_entropy import CHUNK_BYTES
from petl_kernels.ops.loss_by_words import blocks_of
from petl_kernels.ops.parallel_ffn import room
from petl_kernels.ops.product import ALIGNED

# Instructions a thread spends on a logit of the loss, counted for sm_90.
EXPONENTIAL = 16.5


def bottleneck_adapter(t: int, d: int, m: int, size: int, backward: bool = True, fused: bool | None = None) -> Counts:
    """LayerNorm, down, activation, up, residual: 4·t·d·m forward and 8·t·d·m backward.

    Ours does 10 backward, since it keeps x alone and forms LN(x) and the down product again. fused: a block of rows in
    one launch, or products of the library; as the wrapper decides where it is not given.
    """
    x, matrix, product = t * d * size, d * m, 2 * t * d * m
    parameters = FP32 * (2 * matrix + m + 3 * d)
    fused = m <= ADAPTER_FUSED if fused is None else fused
    weights = 2 * matrix * size
    fold = Launch("_fold_kernel", bytes=FP32 * 2 * matrix + weights)
    if fused:
        kernels = [fold, Launch("_forward_kernel", 2 * product, 2 * x + weights)]
    else:
        kernels = [_cast(matrix, size), Launch("_rows_kernel", bytes=3 * x), library_product(t, m, d, size)]
        kernels.append(added_product(t, d, m, size))
    moved, flops = 2 * x + parameters, 2 * product
    if backward:
        kernels += [*([fold] if fused else []), *_adapter_backward(t, d, m, size, True, True, fused)]
        moved += 3 * x + (parameters - FP32 * d) + parameters  # the up bias has no part in backward
        flops += 4 * product
    return Counts(flops, moved, tuple(kernels))


def _cast(matrix: int, size: int) -> Launch:
    return Launch("library cast", bytes=2 * matrix * (FP32 + size), library=True)


def _adapter_backward(t: int, d: int, m: int, size: int, need_dx: bool, norm: bool, fused: bool) -> list[Launch]:
    if fused:
        return _adapter_backward_fused(t, d, m, size, need_dx, norm)
    x, z, sums = t * d * size, t * m * size, FP32 * 4 * PROCESSORS
    kernels = [_cast(d * m, size)] + ([Launch("_rows_kernel", bytes=2 * x)] if norm else [])
    kernels += [library_product(t, m, d, size)] * 2  # z and dy U
    kernels += [Launch("_latent_gradient_kernel", bytes=3 * z + sums * m), Launch("_sum_kernel", bytes=sums * m)]
    kernels += [library_product(d, m, t, size)] * 2  # dU and dD
    if norm:
        kernels += [
            library_product(t, d, m, size),
            Launch("_norm_backward_kernel", bytes=4 * x + 3 * FP32 * ROW_PARTS * d),
        ]
        return [*kernels, Launch("_sum_kernel", bytes=3 * FP32 * (ROW_PARTS + 1) * d)]
    return [*kernels, Launch("_column_sums_kernel", bytes=x), Launch("_sum_kernel", bytes=FP32 * TOKEN_PARTS * d)]


def _adapter_backward_fused(t: int, d: int, m: int, size: int, need_dx: bool, norm: bool) -> list[Launch]:
    x, z, matrix, product = t * d * size, t * m * size, d * m, 2 * t * d * m
    kernels = [
        Launch("_backward_kernel", (2 + need_dx) * product, (2 + need_dx) * x + 2 * z + 2 * matrix * size),
        Launch("_token_sums_kernel", 2 * product, 2 * x + 2 * z + FP32 * TOKEN_PARTS * 2 * matrix),
        Launch("_sum_kernel", bytes=FP32 * (TOKEN_PARTS + 1) * 2 * matrix),
    ]
    return kernels + ([Launch("_norm_gradients_kernel", bytes=FP32 * 3 * matrix)] if norm else [])


def frozen_ffn(t: int, d: int, f: int, activation: str, gated: bool, size: int, recompute: bool = False) -> Counts:
    """Two or three frozen products with what lies between, in chunks of rows; biases (frozen) unless gated.

    A ReLU without a gate rides in its product.
    """
    weights = 3 if gated else 2
    keeps_bits = activation == "relu" and not gated and not recompute
    kept = 0 if recompute else t * math.ceil(f / 8) if keeps_bits else t * f * size * (weights - 1)
    matrix, x = d * f * size, t * d * size
    biases = 0 if gated else size * (f + d)
    moved = 2 * x + weights * matrix + biases + kept  # forward
    moved += 2 * x + weights * matrix + kept + (x if recompute else 0) + (0 if gated else size * f)
    rows = chunk_rows(t, f, size, "cuda")
    kernels = []
    for first in range(0, t, rows):
        kernels += _ffn_chunk(min(rows, t - first), d, f, activation, gated, size, recompute)
    return Counts(4 * weights * t * d * f, moved, tuple(kernels))


def parallel_ffn(t: int, d: int, f: int, m: int, activation: str, size: int) -> Counts:
    """frozen_ffn (no gate, biases) with an adapter of m more hidden units, p with what they are rounded up to.

    12·t·d·m more: two products forward, four backward. Ours does 16: it makes the adapter's part of h and dh twice.
    """
    wide = f + room(m)
    network = frozen_ffn(t, d, wide, activation, False, size)
    adapter = FP32 * (2 * d * m + m)
    moved = network.bytes + adapter + FP32 * d  # forward, with the up bias
    moved += t * d * size + 2 * adapter + FP32 * d  # x and the adapter into backward, its gradients out
    names = ("copy D", "copy d", "multiply U", "add u", *(("cast D", "cast U") if m <= ADAPTER_FUSED else ()))
    small = [Launch(name, library=True) for name in names]
    own = _adapter_backward(t, d, m, size, need_dx=False, norm=False, fused=m <= ADAPTER_FUSED)
    kernels = (*small, *network.launched(), *own)
    return Counts(8 * t * d * f + 12 * t * d * m, moved, kernels)


def _ffn_chunk(t: int, d: int, f: int, activation: str, gated: bool, size: int, recompute: bool) -> list[Launch]:
    into, out_of = [library_product(t, f, d, size)], [library_product(t, d, f, size)]
    inner, bits, elements = t * f * size, t * math.ceil(f / 8), t * f
    relu = activation == "relu" and not gated
    work = [each * elements for each in ACTIVATION["gated relu" if gated else "relu"]]
    if gated:
        forward = [Launch("_gated_kernel", bytes=3 * inner, instructions=work[0])]
        backward = [Launch("_gated_backward_kernel", bytes=5 * inner, instructions=work[1])]
    elif relu:
        forward = [Launch("_positive_kernel", bytes=inner + bits, instructions=work[0])]
        backward = [Launch("_activation_backward_kernel", bytes=2 * inner + bits, instructions=work[1])]
    else:
        forward = [Launch("_activation_kernel", bytes=2 * inner, instructions=work[0])]
        backward = [Launch("_activation_backward_kernel", bytes=3 * inner, instructions=work[1])]
    inputs = 1 + gated
    again = into * inputs + (forward if relu else []) if recompute else []
    if relu and recompute:
        forward = []  # its bits are made in backward
    return [*into * inputs, *forward, *out_of, *into, *again, *backward, *out_of * inputs]


def linear_cross_entropy(t: int, d: int, words: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Counts:
    """The smoothed loss of t rows over a frozen (words, d) weight, and dh, by words: W twice a block of rows."""
    x = t * d * size
    moved = words * d * size + 2 * x + 8 * t + FP32  # hidden, W and labels in, dh and the loss out
    moved += 2 * x  # dh times dloss
    dtype = torch.float32 if size == FP32 else torch.bfloat16
    rows, columns = blocks_of(t, d, words, dtype, "cuda", chunk_bytes, copied=False)
    kernels = [Launch("sum of words", bytes=words * d * size, library=True)]
    for first in range(0, t, rows):
        part = min(rows, t - first)
        own, total = part * d * size, part * d * FP32
        kernels.append(Launch("_begin_kernel", bytes=2 * own))
        for start in range(0, words, columns):
            count = min(columns, words - start)
            kernels += _words_block(part, d, count, size, start == 0)
        kernels.append(Launch("_end_kernel", bytes=total + 2 * own))
    return Counts(4 * t * d * words, moved, tuple(kernels))


def _words_block(t: int, d: int, words: int, size: int, fresh: bool) -> list[Launch]:
    """z, E and O of one block of rows and words: E is written, read and written, and read; O read and written.

    E, and O with it, only travel where they do not fit the L2 cache.
    """
    e, total, x, weight = t * words * size, t * d * FP32 * (1 if fresh else 2), t * d * size, words * d * size
    into, out_of = [], []
    for part in (words - words % ALIGNED, words % ALIGNED):
        if part:
            own, read = e * part // words, weight * part // words
            work = {"flops": 2 * t * part * d, "library": True}
            into.append(Launch("library product", bytes=x + read + own, cached=x + own, working_set=e, **work))
            moved = total + read + own
            out_of.append(Launch("library product", bytes=moved, cached=moved, working_set=e + t * d * FP32, **work))
    work = EXPONENTIAL * t * words
    return [*into, Launch("_words_kernel", bytes=2 * e, instructions=work, cached=2 * e, working_set=e), *out_of]
