"""What each op has to do, counted: operations and bytes that nobody can avoid, and the launches that ours makes of it.

Operations are those of matrix products, two a multiplication. Bytes are the op's own inputs and outputs, read or
written once, forward and backward: what backward saves is an output of forward and an input of backward. The launches
are those of the Triton wrappers at their tiles for sm_80 and newer; each has its operations, its device memory, and,
where they bound it, the instructions a thread spends on each element (counted in the compiled code, bench/NOTES.md).
A launch of the library (cuBLAS, PyTorch) says so. tests/bench/test_counts.py holds all of this to the code.

t tokens, k inputs and n outputs of a linear, d the width of the model, m a bottleneck, f the width of a feed-forward
block's inside; `size` is the bytes of an element of the activations. Adapters are kept in fp32.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

FP32 = 4
# Parts of a sum over tokens that are written and added up: two programs for each multiprocessor, over the 16 tiles of
# columns that d = 1024 has.
PARTS = 17
# The same where programs walk over whole rows (triton/config.py, ROW_PROGRAMS).
ROW_PARTS = 2 * 132
# Instructions an element, counted for sm_90.
MASK = 12
ACTIVATION = {"relu": (8.5, 9.5), "gated relu": (10.5, 17.5)}
EXPONENTIAL = 16.5
DROPOUT_ADD = (18.4, 15.8)
ATTENTION = {False: (12.7, 19.2), True: (21.6, 30.7)}  # of a score, without dropout and with it
QUANTIZED_LOOP = {"int8": (8.4, 8.8), "nf4": (21, 21)}
QUANTIZED_ALONE = {"int8": (10.6, 18), "nf4": (13.8, 23)}
DEQUANTIZE = {"int8": 8.5, "nf4": 17.1}
QUANTIZE = {"int8": 26, "nf4": 54}
# What the wrappers decide by (petl_kernels/backends/triton/config.py).
ADAPTER_FUSED = 128
FFN_CHUNK_BYTES, FFN_CHUNK_ROWS = 64 << 20, 256
FUSED_RANKS = 64
BORDER_PARTS = 64
QUANTIZED_LOOP_ROWS = {"int8": 512, "nf4": 256}
QUANTIZED_VECTOR_ROWS = 4
QUANTIZED_TILE_BYTES = 32 << 20
PROCESSORS = 132
LOSS_WORDS, ALIGNED = (2048, 8192), 64  # of a block at least, unless there are not so many, and at most
SENTENCE = 128  # queries of a sentence whose gradients one program makes; before sm_90 64, which is not counted


@dataclass(frozen=True)
class Launch:
    name: str
    flops: int = 0
    bytes: int = 0
    instructions: float = 0.0
    cached: int = 0  # of the bytes: logits, which only travel where a chunk of them does not fit the L2 cache
    working_set: int = 0  # bytes of that chunk
    library: bool = False


@dataclass(frozen=True)
class Counts:
    """What cannot be avoided (flops, bytes), and the launches of ours; None where ours has no GPU kernel."""

    flops: int
    bytes: int
    kernels: tuple[Launch, ...] | None = None

    @property
    def launches(self) -> int | None:
        """Of our own kernels, forward and backward."""
        return None if self.kernels is None else sum(not kernel.library for kernel in self.kernels)

    def __add__(self, other: Counts) -> Counts:
        both = None if self.kernels is None or other.kernels is None else self.kernels + other.kernels
        return Counts(self.flops + other.flops, self.bytes + other.bytes, both)


def total(counted: Iterable[Counts]) -> Counts:
    return functools.reduce(operator.add, counted)


def _product(name: str, rows: int, cols: int, inner: int, size: int, **other) -> Launch:
    """A dense product: both operands and the result once."""
    return Launch(name, 2 * rows * cols * inner, size * (rows * inner + cols * inner + rows * cols), **other)


def _library(rows: int, cols: int, inner: int, size: int) -> Launch:
    return _product("library product", rows, cols, inner, size, library=True)


# ---- limits that are no op of ours ----------------------------------------------------------------------------------


def streams(count: int, elements: int, size: int) -> Counts:
    """One pass of the library's that reads and writes ``count`` arrays of as many elements: a copy has two."""
    moved = count * elements * size
    return Counts(0, moved, (Launch("library pass", bytes=moved, library=True),))


# ---- linears --------------------------------------------------------------------------------------------------------


def frozen_linear(t: int, n: int, k: int, size: int, bias: bool = True, dbias: bool = False) -> Counts:
    """y = x Wᵀ + c, dx = dy W, both the library's, and dc where the bias is trained: the limit of every linear."""
    moved = size * (2 * t * k + 2 * t * n + 2 * n * k + (n if bias else 0)) + (FP32 * n if dbias else 0)
    kernels = [_library(t, n, k, size), _library(t, k, n, size)]
    if dbias:
        kernels += [Launch("_column_sums_kernel", bytes=t * n * size), Launch("_sum_kernel", bytes=FP32 * PARTS * n)]
    return Counts(4 * t * n * k, moved, tuple(kernels))


def lora_linear(
    t: int, k: int, outputs: Sequence[int], ranks: Sequence[int], size: int, dropout: bool = False
) -> Counts:
    """Linears (N_g, k) with adapters of rank r_g that read one x: 4·t·k·N + 6·t·(k·R + Σ N_g·r_g)."""
    n, r = sum(outputs), sum(ranks)
    a, b = r * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    x, y, s, w, adapters = t * k * size, t * n * size, t * r * size, n * k * size, FP32 * (a + b)
    mask = MASK * t * k if dropout else 0.0
    forward = x + w + n * size + adapters + y + s
    backward = y + x + s + w + adapters + x + adapters
    rank_part = _rank_part if r <= FUSED_RANKS else _rank_part_apart
    kernels = (
        *rank_part("_rank_outputs_kernel", "_project_kernel", t, k, outputs, ranks, size, mask),
        *(_adding(t, n_g, k, size) for n_g in outputs),
        *rank_part("_rank_input_kernel", "_rank_gradients_kernel", t, k, outputs, ranks, size, mask),
        *(_adding(t, k, n_g, size) for n_g in outputs),
        Launch("_adapter_gradients_kernel", 2 * t * (a + b), y + x + 2 * s + PARTS * adapters, mask),
        Launch("_sum_kernel", bytes=(PARTS + 1) * adapters),
    )
    return Counts(4 * t * n * k + 6 * t * (a + b), forward + backward, kernels)


def _rank_part(fused, _, t, k, outputs, ranks, size, mask) -> list[Launch]:
    """s and the rank part of y, or ds and that of dx, from one read of x or dy."""
    n, r = sum(outputs), sum(ranks)
    a, b = r * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    return [Launch(fused, 2 * t * (a + b), size * t * (k + n + r) + FP32 * (a + b), mask)]


def _rank_part_apart(fused, alone, t, k, outputs, ranks, size, mask) -> list[Launch]:
    """The same where the ranks are too many: s or ds, then products of the library's; casts and scales are left out."""
    r, into = sum(ranks), fused == "_rank_outputs_kernel"
    b = sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    if into:
        first = Launch(alone, 2 * t * r * k, size * t * (k + r) + FP32 * r * k, mask)
        return [first, *(_library(t, n_g, r_g, size) for n_g, r_g in zip(outputs, ranks, strict=True))]
    first = Launch(alone, 2 * t * b, size * t * (sum(outputs) + r) + FP32 * b)
    written = [Launch("library pass", bytes=2 * t * k * size, library=True)]
    dropped = [Launch("_dropout_add_kernel", bytes=2 * t * k * size, instructions=mask)] if mask else []
    return [first, _library(t, k, r, size), *dropped, *written]


def lora_border(t: int, k: int, outputs: Sequence[int], ranks: Sequence[int], size: int) -> Counts:
    """The same linears as one product each way, r_g = 0 for one without an adapter; x and dy come in rows with room."""
    n, r = sum(outputs), math.ceil(sum(ranks) / 8) * 8
    a, b = sum(ranks) * k, sum(n_g * r_g for n_g, r_g in zip(outputs, ranks, strict=True))
    counted = lora_linear(t, k, outputs, ranks, size)
    if not r:
        return replace(counted, kernels=(_filled(n, size), _library(t, n, k, size), _library(t, k, n, size)))
    x, s, adapters = t * k * size, t * sum(ranks) * size, FP32 * (a + b)
    read = size * t * sum(n_g for n_g, r_g in zip(outputs, ranks, strict=True) if r_g)
    blocks = math.ceil(t / 128)
    parts = min(blocks, BORDER_PARTS)
    written = FP32 * (2 * blocks - parts) * b  # all blocks but a part's first are added to what is there
    kernels = (
        Launch("_inputs_kernel", 2 * t * a, x + 2 * s + adapters + n * r * size),
        _library(t, n, k + r, size),
        Launch("_gradients_kernel", 4 * t * b, read + 2 * s + adapters + r * k * size + written),
        Launch("_sum_kernel", bytes=FP32 * (parts + 1) * b),
        Launch("_token_sum_kernel", 2 * t * a, x + s + FP32 * PARTS * a),
        Launch("_sum_kernel", bytes=FP32 * (PARTS + 1) * a),
        _library(t, k, n + r, size),
    )
    return replace(counted, kernels=kernels)


def _filled(n: int, size: int) -> Launch:
    return Launch("_inputs_kernel", bytes=2 * n * size)


def quantized_project(t: int, n: int, k: int, storage: str, size: int) -> Counts:
    """x Ŵᵀ and dy Ŵ, without a bias; Ŵ is dequantized for each of a few rows, in the main loop, or ahead of the
    library's product."""
    weight = stored_bytes(n, k, storage, size)
    moved = size * 2 * (t * k + t * n) + 2 * weight
    in_loop = k % 64 == 0 and t <= QUANTIZED_LOOP_ROWS[storage]
    alone = k % 64 == 0 and t <= QUANTIZED_VECTOR_ROWS
    product = _quantized_alone if alone else _quantized_loop if in_loop else _quantized_ahead
    kernels = (
        *product("_quantized_project_kernel", 0, t, n, k, storage, size, weight),
        *product("_quantized_project_back_kernel", 1, t, k, n, storage, size, weight),
    )
    return Counts(4 * t * n * k, moved, kernels)


def _quantized_alone(_, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    """No products of tiles: multiplications are among the instructions."""
    name = ("_project_rows_kernel", "_project_back_rows_kernel")[direction]
    work = QUANTIZED_ALONE[storage][direction] * t * cols * inner
    return [Launch(name, bytes=size * t * (inner + cols) + weight, instructions=work)]


def _quantized_loop(name, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    rows = min(max(16, 1 << (t - 1).bit_length()), 128)
    tiles = math.ceil(t / rows)
    splits = max(
        1, min(math.ceil(2 * PROCESSORS / (tiles * math.ceil(cols / 64))), inner // ((2 if rows == 16 else 4) * 64))
    )
    parts = FP32 * splits * t * cols if splits > 1 else size * t * cols
    work = QUANTIZED_LOOP[storage][direction] * tiles * cols * inner
    kernels = [Launch(name, 2 * t * cols * inner, size * t * inner + weight + parts, work)]
    return kernels + ([Launch("_sum_kernel", bytes=parts + size * t * cols)] if splits > 1 else [])


def _quantized_ahead(_, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    most = max(1, QUANTIZED_TILE_BYTES // (inner * size))
    most = most // 64 * 64 or most
    length = math.ceil(cols / math.ceil(cols / most))
    length = max(1, min(math.ceil(length / 64) * 64, most))
    kernels = []
    for first in range(0, cols, length):
        part = min(length, cols - first)
        values = part * inner
        moved = weight * part // cols + size * values
        kernels.append(Launch("_dequantize_kernel", bytes=moved, instructions=DEQUANTIZE[storage] * values))
        kernels.append(_library(t, part, inner, size))
    return kernels


def stored_bytes(n: int, k: int, storage: str, size: int) -> int:
    """A weight (n, k): dense, int8 with a scale a row, or nf4 with an absmax for 64 values and a scale for 16,384."""
    if storage == "dense":
        return n * k * size
    if storage == "int8":
        return n * k + FP32 * n
    blocks = math.ceil(n * k / 64)
    return math.ceil(n * k / 2) + blocks + FP32 * math.ceil(blocks / 256) + FP32


def quantize(n: int, k: int, storage: str, size: int) -> Counts:
    """A dense weight into a storage, with the look whether its values are finite."""
    moved, look = n * k * size + stored_bytes(n, k, storage, size), Launch("largest scale", library=True)
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
    moved = n * k * size + stored_bytes(n, k, storage, size)
    return Counts(0, moved, (Launch("_dequantize_kernel", bytes=moved, instructions=DEQUANTIZE[storage] * n * k),))


# ---- adapters, feed-forward blocks, the vocabulary loss -------------------------------------------------------------


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
        kernels = [_cast(matrix, size), Launch("_rows_kernel", bytes=3 * x), _library(t, m, d, size)]
        kernels.append(_adding(t, d, m, size))
    moved, flops = 2 * x + parameters, 2 * product
    if backward:
        kernels += [*([fold] if fused else []), *_adapter_backward(t, d, m, size, True, True, fused)]
        moved += 3 * x + (parameters - FP32 * d) + parameters  # the up bias has no part in backward
        flops += 4 * product
    return Counts(flops, moved, tuple(kernels))


def _cast(matrix: int, size: int) -> Launch:
    return Launch("library cast", bytes=2 * matrix * (FP32 + size), library=True)


def _adding(rows: int, cols: int, inner: int, size: int) -> Launch:
    """A product of the library's that is added to what is there."""
    product = _library(rows, cols, inner, size)
    return replace(product, bytes=product.bytes + rows * cols * size)


def _adapter_backward(t: int, d: int, m: int, size: int, need_dx: bool, norm: bool, fused: bool) -> list[Launch]:
    if fused:
        return _adapter_backward_fused(t, d, m, size, need_dx, norm)
    x, z, sums = t * d * size, t * m * size, FP32 * 4 * PROCESSORS
    kernels = [_cast(d * m, size)] + ([Launch("_rows_kernel", bytes=2 * x)] if norm else [])
    kernels += [_library(t, m, d, size)] * 2  # z and dy U
    kernels += [Launch("_latent_gradient_kernel", bytes=3 * z + sums * m), Launch("_sum_kernel", bytes=sums * m)]
    kernels += [_library(d, m, t, size)] * 2  # dU and dD
    if norm:
        kernels += [_library(t, d, m, size), Launch("_norm_backward_kernel", bytes=4 * x + 3 * FP32 * ROW_PARTS * d)]
        return [*kernels, Launch("_sum_kernel", bytes=3 * FP32 * (ROW_PARTS + 1) * d)]
    return [*kernels, Launch("_column_sums_kernel", bytes=x), Launch("_sum_kernel", bytes=FP32 * PARTS * d)]


def _adapter_backward_fused(t: int, d: int, m: int, size: int, need_dx: bool, norm: bool) -> list[Launch]:
    x, z, matrix, product = t * d * size, t * m * size, d * m, 2 * t * d * m
    kernels = [
        Launch("_backward_kernel", (2 + need_dx) * product, (2 + need_dx) * x + 2 * z + 2 * matrix * size),
        Launch("_token_sums_kernel", 2 * product, 2 * x + 2 * z + FP32 * PARTS * 2 * matrix),
        Launch("_sum_kernel", bytes=FP32 * (PARTS + 1) * 2 * matrix),
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
    most = max(FFN_CHUNK_ROWS, FFN_CHUNK_BYTES // (f * size))
    rows = math.ceil(t / math.ceil(t / most))
    kernels = []
    for first in range(0, t, rows):
        kernels += _ffn_chunk(min(rows, t - first), d, f, activation, gated, size, recompute)
    return Counts(4 * weights * t * d * f, moved, tuple(kernels))


def parallel_ffn(t: int, d: int, f: int, m: int, activation: str, size: int) -> Counts:
    """frozen_ffn (no gate, biases) with an adapter of m more hidden units, p with what they are rounded up to.

    12·t·d·m more: two products forward, four backward. Ours does 16: it makes the adapter's part of h and dh twice.
    """
    wide = f + math.ceil(m / 8) * 8
    network = frozen_ffn(t, d, wide, activation, False, size)
    adapter = FP32 * (2 * d * m + m)
    moved = network.bytes + adapter + FP32 * d  # forward, with the up bias
    moved += t * d * size + 2 * adapter + FP32 * d  # x and the adapter into backward, its gradients out
    names = ("copy D", "copy d", "multiply U", "add u", *(("cast D", "cast U") if m <= ADAPTER_FUSED else ()))
    small = [Launch(name, library=True) for name in names]
    own = _adapter_backward(t, d, m, size, need_dx=False, norm=False, fused=m <= ADAPTER_FUSED)
    kernels = (*small, *network.kernels, *own)
    return Counts(8 * t * d * f + 12 * t * d * m, moved, kernels)


def _ffn_chunk(t: int, d: int, f: int, activation: str, gated: bool, size: int, recompute: bool) -> list[Launch]:
    into, out_of = [_library(t, f, d, size)], [_library(t, d, f, size)]
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


def linear_cross_entropy(t: int, d: int, words: int, size: int, chunk_bytes: int = 32 << 20) -> Counts:
    """The smoothed loss of t rows over a frozen (words, d) weight, and dh, by words: W twice a block of rows."""
    x = t * d * size
    moved = words * d * size + 2 * x + 8 * t + FP32  # hidden, W and labels in, dh and the loss out
    moved += 2 * x  # dh times dloss
    rows, columns = loss_blocks(t, d, words, size, chunk_bytes)
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


def loss_blocks(t: int, d: int, words: int, size: int, chunk_bytes: int) -> tuple[int, int]:
    """Rows and words of a block on a card (petl_kernels/ops/loss_by_words.py)."""
    whole = max(ALIGNED, 1 << (words - 1).bit_length())
    least, most = (min(each, whole) for each in LOSS_WORDS)
    rows = math.ceil(t / math.ceil(t / min(t, max(1, chunk_bytes // (d * FP32 + least * size)))))
    room = max(ALIGNED, (chunk_bytes // rows - d * FP32) // size)
    return rows, min(most, 1 << (room.bit_length() - 1))


# ---- between the products -------------------------------------------------------------------------------------------


def activation(t: int, f: int, kind: str, size: int, dropout: bool = False) -> Counts:
    """z in, y out; dy in, dz out. relu keeps a bit an element, the others z."""
    elements = t * f
    kept = t * math.ceil(f / 8)
    written = kept if kind == "relu" else 0
    read = kept if kind == "relu" else elements * size
    forward, backward = 2 * elements * size + written, 2 * elements * size + read
    work = [(each + (MASK if dropout else 0)) * elements for each in ACTIVATION["relu"]]
    kernels = (
        Launch("_activation_kernel", bytes=forward, instructions=work[0]),
        Launch("_activation_backward_kernel", bytes=backward, instructions=work[1]),
    )
    return Counts(0, forward + backward, kernels)


def gated_activation(t: int, f: int, size: int, dropout: bool = False) -> Counts:
    """act(z) ⊙ g: three arrays forward, five backward."""
    array = t * f * size
    work = [(each + (MASK if dropout else 0)) * t * f for each in ACTIVATION["gated relu"]]
    kernels = (
        Launch("_gated_kernel", bytes=3 * array, instructions=work[0]),
        Launch("_gated_backward_kernel", bytes=5 * array, instructions=work[1]),
    )
    return Counts(0, 8 * array, kernels)


def dropout_add(t: int, d: int, size: int) -> Counts:
    array = t * d * size
    kernels = (
        Launch("_dropout_add_kernel", bytes=3 * array, instructions=DROPOUT_ADD[0] * t * d),
        Launch("_dropout_add_kernel", bytes=2 * array, instructions=DROPOUT_ADD[1] * t * d),
    )
    return Counts(0, 5 * array, kernels)


def dropout_add_norm(t: int, d: int, size: int, trained: bool = False, centred: bool = True) -> Counts:
    """y and the residual in, h and u out; du, h and the residual's gradient in, that of h and of y out."""
    parameters = 2 if centred else 1
    array, rows, sums = t * d * size, FP32 * parameters * t, FP32 * parameters * d
    forward, backward = 4 * array + rows + parameters * d * size, 5 * array + rows + d * size
    work = [each * t * d for each in DROPOUT_ADD]
    kernels = [
        Launch("_sum_norm_kernel", bytes=forward, instructions=work[0]),
        Launch("_norm_backward_kernel", bytes=backward + trained * ROW_PARTS * sums, instructions=work[1]),
    ]
    if trained:
        kernels.append(Launch("_sum_kernel", bytes=(ROW_PARTS + 1) * sums))
        backward += sums
    return Counts(0, forward + backward, tuple(kernels))


def layer_norm(t: int, d: int, size: int, trained: bool = False) -> Counts:
    """Parameters of the activations' dtype; their gradients come as fp32 sums."""
    return _norm(t, d, size, trained, parameters=2, statistics=2)


def rms_norm(t: int, d: int, size: int, trained: bool = False) -> Counts:
    return _norm(t, d, size, trained, parameters=1, statistics=1)


def _norm(t: int, d: int, size: int, trained: bool, parameters: int, statistics: int) -> Counts:
    x, rows = t * d * size, FP32 * statistics * t
    forward = 2 * x + rows + parameters * d * size
    backward = 3 * x + rows + d * size
    sums = FP32 * parameters * d if trained else 0
    kernels = [
        Launch("_norm_kernel", bytes=forward),
        Launch("_norm_backward_kernel", bytes=backward + ROW_PARTS * sums),
    ]
    if trained:
        kernels.append(Launch("_sum_kernel", bytes=(ROW_PARTS + 1) * sums))
        backward += sums
    return Counts(0, forward + backward, tuple(kernels))


def attention(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, size: int, mask: int = 0, pairs: int = 0,
    sentences: int = 0, dropout: bool = False,
) -> Counts:  # fmt: skip
    """Two products forward, four backward; ours makes the scores again in backward, twice where sentences are long.

    ``mask``: its bytes, or those of a packed row's boundaries. ``pairs``: those of a query and a key in one sentence,
    of ``sentences``, where ``queries`` and ``keys`` are a packed row's.
    """
    scores = batch * heads * (pairs or queries * keys)
    product = 2 * scores * head_dim
    q, kv = batch * heads * queries * head_dim * size, 2 * batch * heads * keys * head_dim * size
    lse = FP32 * batch * heads * queries
    forward = 2 * q + kv + lse + mask
    backward = 3 * q + kv + lse + mask + q + kv  # do, q, o, k, v in; dq, dk, dv out
    work = [each * scores for each in ATTENTION[dropout]]
    kernels = [Launch("_attention_kernel", 2 * product, forward, work[0])]
    wide = head_dim > 64
    if size < FP32 and batch * queries <= (sentences or batch) * SENTENCE and not (sentences and wide):
        kernels.append(Launch("_sentence_gradients_kernel", 5 * product, backward, work[1]))
    else:
        kernels.append(Launch("_query_gradient_kernel", 3 * product, 4 * q + kv + 2 * lse + mask, work[1]))
        kernels.append(Launch("_key_gradients_kernel", 4 * product, 2 * q + 2 * kv + 2 * lse + mask, work[1]))
    return Counts(6 * product, forward + backward, tuple(kernels))


# ---- whole layers and steps -----------------------------------------------------------------------------------------


def layer(side: str, rows: int, length: int, d: int, ffn: int, heads: int, head_dim: int, gated: bool, size: int):
    """A frozen layer's forward and input gradients: its linears, its attentions, and the stream between blocks.

    Bytes: each weight twice, and for each linear and attention its activations once each way.
    """
    t, inner = rows * length, heads * head_dim
    attentions = 2 if side == "decoder" else 1
    scores = attention(rows, heads, length, length, head_dim, size)
    projections = frozen_linear(t, inner, d, size, bias=False)
    blocks = attentions * (8 * t * inner * d * 2 + scores.flops)
    moved = attentions * (4 * projections.bytes + scores.bytes)
    weights = 3 if gated else 2
    linears = weights * frozen_linear(t, ffn, d, size, bias=False).bytes
    return Counts(blocks + 4 * weights * t * d * ffn, moved + linears)


def step(layers: int, source: int, target: int, d: int, ffn: int, words: int, size: int) -> Counts:
    """Source and target tokens through the frozen linears of a BART-family model and its output projection.

    Forward and input gradients; attention's own products are left out, as they are where work is planned.
    """
    of_source = layers * (6 * d * d + 2 * d * ffn)  # the decoder's keys and values of the source among them
    of_target = layers * (6 * d * d + 2 * d * ffn) + words * d
    return Counts(4 * (source * of_source + target * of_target), 2 * size * (of_source + of_target))
