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
# The same where programs walk over whole rows: four for each multiprocessor (triton/config.py).
ROW_PARTS = 4 * 132
# Instructions an element, counted for sm_90.
MASK = 22
ACTIVATION = {"relu": (8.5, 9.5), "gated relu": (10.5, 17.5)}
DROPOUT_ADD = (28, 26)
QUANTISED_LOOP = {"int8": (8.4, 8.8), "nf4": (21, 21)}
DEQUANTISE = {"int8": 8.5, "nf4": 24.8}
# What the wrappers decide by (petl_kernels/backends/triton/config.py).
ADAPTER_LIMIT = 256
FFN_CHUNK_BYTES, FFN_CHUNK_ROWS = 32 << 20, 256
FUSED_RANKS = 64
QUANTISED_LOOP_ROWS = {"int8": 512, "nf4": 256}
QUANTISED_TILE_BYTES = 32 << 20
PROCESSORS = 132
VOCABULARY_BLOCK = 4096


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
    """y = x Wᵀ + c, dx = dy W, and dc where the bias is trained."""
    moved = size * (2 * t * k + 2 * t * n + 2 * n * k + (n if bias else 0)) + (FP32 * n if dbias else 0)
    kernels = [_product("_matmul_kernel", t, n, k, size), _product("_matmul_kernel", t, k, n, size)]
    if dbias:
        kernels += [Launch("_column_sums_kernel", bytes=t * n * size), Launch("_sum_kernel", bytes=FP32 * PARTS * n)]
    return Counts(4 * t * n * k, moved, tuple(kernels))


def frozen_linear_library(t: int, n: int, k: int, size: int) -> Counts:
    """The same from the library, as it runs by default on a GPU: the limit of every linear with an adapter."""
    counts = frozen_linear(t, n, k, size)
    return Counts(counts.flops, counts.bytes, (_library(t, n, k, size), _library(t, k, n, size)))


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
        *(_onto(t, n_g, k, size) for n_g in outputs),
        *rank_part("_rank_input_kernel", "_rank_gradients_kernel", t, k, outputs, ranks, size, mask),
        *(_onto(t, k, n_g, size) for n_g in outputs),
        Launch("_adapter_gradients_kernel", 2 * t * (a + b), y + x + 2 * s + PARTS * adapters, mask),
        Launch("_sum_kernel", bytes=(PARTS + 1) * adapters),
    )
    return Counts(4 * t * n * k + 6 * t * (a + b), forward + backward, kernels)


def _onto(rows: int, cols: int, inner: int, size: int) -> Launch:
    """A product of the library's that is added onto what is there."""
    product = _library(rows, cols, inner, size)
    return replace(product, bytes=product.bytes + rows * cols * size)


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
    parts = math.ceil(t / 128)
    kernels = (
        Launch("_inputs_kernel", 2 * t * a, x + 2 * s + adapters + n * r * size),
        _library(t, n, k + r, size),
        Launch("_gradients_kernel", 4 * t * b, read + 2 * s + adapters + r * k * size + FP32 * parts * b),
        Launch("_sum_kernel", bytes=FP32 * (parts + 1) * b),
        Launch("_token_sum_kernel", 2 * t * a, x + s + FP32 * PARTS * a),
        Launch("_sum_kernel", bytes=FP32 * (PARTS + 1) * a),
        _library(t, k, n + r, size),
    )
    return replace(counted, kernels=kernels)


def _filled(n: int, size: int) -> Launch:
    return Launch("_inputs_kernel", bytes=2 * n * size)


def quantised_project(t: int, n: int, k: int, storage: str, size: int) -> Counts:
    """x Ŵᵀ and dy Ŵ, without a bias; Ŵ is dequantised in the main loop, or ahead of the library's product."""
    weight = stored_bytes(n, k, storage, size)
    moved = size * 2 * (t * k + t * n) + 2 * weight
    in_loop = k % 64 == 0 and t <= QUANTISED_LOOP_ROWS[storage]
    product = _quantised_loop if in_loop else _quantised_ahead
    kernels = (
        *product("_quantised_project_kernel", 0, t, n, k, storage, size, weight),
        *product("_quantised_project_back_kernel", 1, t, k, n, storage, size, weight),
    )
    return Counts(4 * t * n * k, moved, kernels)


def _quantised_loop(name, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    rows = min(max(16, 1 << (t - 1).bit_length()), 128)
    tiles = math.ceil(t / rows)
    splits = max(1, min(math.ceil(2 * PROCESSORS / (tiles * math.ceil(cols / 64))), inner // (4 * 64)))
    parts = FP32 * splits * t * cols if splits > 1 else size * t * cols
    work = QUANTISED_LOOP[storage][direction] * tiles * cols * inner
    kernels = [Launch(name, 2 * t * cols * inner, size * t * inner + weight + parts, work)]
    return kernels + ([Launch("_sum_kernel", bytes=parts + size * t * cols)] if splits > 1 else [])


def _quantised_ahead(_, direction, t, cols, inner, storage, size, weight) -> list[Launch]:
    most = max(1, QUANTISED_TILE_BYTES // (inner * size))
    most = most // 64 * 64 or most
    length = math.ceil(cols / math.ceil(cols / most))
    length = max(1, min(math.ceil(length / 64) * 64, most))
    kernels = []
    for first in range(0, cols, length):
        part = min(length, cols - first)
        values = part * inner
        moved = weight * part // cols + size * values
        kernels.append(Launch("_dequantise_kernel", bytes=moved, instructions=DEQUANTISE[storage] * values))
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


def conversion(n: int, k: int, storage: str, size: int) -> Counts:
    """A dense weight into a storage, or back: no product; quantising has no Triton kernel."""
    return Counts(0, n * k * size + stored_bytes(n, k, storage, size))


# ---- adapters, feed-forward blocks, the vocabulary loss -------------------------------------------------------------


def bottleneck_adapter(t: int, d: int, m: int, size: int, backward: bool = True) -> Counts:
    """LayerNorm, down, activation, up, residual: 4·t·d·m forward and 8·t·d·m backward.

    Ours does 10 backward, since it keeps x alone and forms LN(x) and the down product again.
    """
    x, z, matrix, product = t * d * size, t * m * size, d * m, 2 * t * d * m
    parameters = FP32 * (2 * matrix + m + 3 * d)
    padded = max(16, 1 << (m - 1).bit_length())
    weights = 2 * matrix * size
    fold = Launch("_fold_kernel", bytes=FP32 * 2 * matrix + weights)
    if padded <= ADAPTER_LIMIT:
        kernels = [fold, Launch("_forward_kernel", 2 * product, 2 * x + weights)]
    else:
        latent = Launch("_latent_kernel", product, x + z + weights // 2)
        kernels = [fold, latent, Launch("_up_kernel", product, z + 2 * x + weights // 2)]
    moved, flops = 2 * x + parameters, 2 * product
    if backward:
        kernels += [fold, *_adapter_backward(t, d, m, size, need_dx=True)]
        moved += 3 * x + (parameters - FP32 * d) + parameters  # the up bias has no part in backward
        flops += 4 * product
    return Counts(flops, moved, tuple(kernels))


def _adapter_backward(t: int, d: int, m: int, size: int, need_dx: bool) -> list[Launch]:
    x, z, matrix, product = t * d * size, t * m * size, d * m, 2 * t * d * m
    weights = 2 * matrix * size
    if 2 * max(16, 1 << (m - 1).bit_length()) <= ADAPTER_LIMIT:
        made = [Launch("_backward_kernel", (2 + need_dx) * product, (2 + need_dx) * x + 2 * z + weights)]
    else:
        made = [Launch("_latent_backward_kernel", 2 * product, 2 * x + 2 * z + weights)]
        made += [Launch("_dx_kernel", product, z + 3 * x + weights // 2)] if need_dx else []
    sums = Launch("_token_sums_kernel", 2 * product, 2 * x + 2 * z + FP32 * PARTS * 2 * matrix)
    return [*made, sums, Launch("_finish_kernel", bytes=FP32 * (PARTS + 2) * 2 * matrix)]


def frozen_ffn(t: int, d: int, f: int, activation: str, gated: bool, size: int, recompute: bool = False) -> Counts:
    """Two or three frozen products with what lies between, in chunks of rows; biases (frozen) unless gated."""
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
        kernels += _ffn_chunk(min(rows, t - first), d, f, weights, kept / t, size, recompute)
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
    small = [Launch(name, library=True) for name in ("copy D", "copy d", "multiply U", "add u", "cast D", "cast U")]
    kernels = (*small, *network.kernels, *_adapter_backward(t, d, m, size, need_dx=False))
    return Counts(8 * t * d * f + 12 * t * d * m, moved, kernels)


def _ffn_chunk(t: int, d: int, f: int, weights: int, kept_a_row: float, size: int, recompute: bool) -> list[Launch]:
    into, out_of = _library(t, f, d, size), _library(t, d, f, size)
    inner = t * f * size
    forward_work, backward_work = ACTIVATION["relu" if weights == 2 else "gated relu"]
    forward = Launch("_hidden_kernel", bytes=weights * inner + int(kept_a_row * t), instructions=forward_work * t * f)
    moved = 2 * inner + (int(kept_a_row * t) if kept_a_row else (weights - 1) * inner) + (weights - 2) * inner
    backward = Launch("_hidden_backward_kernel", bytes=moved, instructions=backward_work * t * f)
    again = [into] * (weights - 1) if recompute else []
    return [*[into] * (weights - 1), forward, out_of, into, *again, backward, *[out_of] * (weights - 1)]


def linear_cross_entropy(t: int, d: int, words: int, size: int, chunk_bytes: int = 32 << 20) -> Counts:
    """The loss of t rows over a frozen (words, d) weight, and dh: 4·t·d·V, and W twice for each chunk of rows."""
    x = t * d * size
    moved = words * d * size + 2 * x + 8 * t + FP32  # hidden, W and labels in, dh and the loss out
    moved += 2 * x  # dh times dloss
    width = math.ceil(words / 16) * 16
    rows = math.ceil(t / math.ceil(t / max(1, chunk_bytes // (width * size))))
    kernels = []
    for first in range(0, t, rows):
        part = min(rows, t - first)
        logits = part * words * size
        kernels += [
            replace(_library(part, words, d, size), cached=logits, working_set=logits),
            Launch("_sums_kernel", bytes=logits, cached=logits, working_set=logits),
            Launch("_loss_kernel", bytes=2 * logits, cached=2 * logits, working_set=logits),
            replace(_library(part, d, words, size), cached=logits, working_set=logits),
        ]
    return Counts(4 * t * d * words, moved, tuple(kernels))


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
        Launch("_sum_norm_backward_kernel", bytes=backward + trained * ROW_PARTS * sums, instructions=work[1]),
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
    kernels = [Launch("_norm_kernel", bytes=forward), Launch("_norm_dx_kernel", bytes=backward)]
    if trained:
        sums = FP32 * parameters * d
        kernels.append(Launch("_norm_sums_kernel", bytes=2 * x + rows + PARTS * sums))
        kernels.append(Launch("_sum_kernel", bytes=(PARTS + 1) * sums))
        backward += sums
    return Counts(0, forward + backward, tuple(kernels))


def attention(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, size: int, mask: int = 0, pairs: int = 0
) -> Counts:
    """Two products forward, four backward; ours makes the scores again, twice, in backward.

    ``mask``: its bytes, or those of a packed row's boundaries. ``pairs``: those of a query and a key in one sentence,
    where ``queries`` and ``keys`` are a packed row's.
    """
    product = 2 * batch * heads * (pairs or queries * keys) * head_dim
    q, kv = batch * heads * queries * head_dim * size, 2 * batch * heads * keys * head_dim * size
    lse = FP32 * batch * heads * queries
    forward = 2 * q + kv + lse + mask
    backward = 3 * q + kv + lse + mask + q + kv  # do, q, o, k, v in; dq, dk, dv out
    kernels = (
        Launch("_attention_kernel", 2 * product, forward),
        Launch("_query_gradient_kernel", 3 * product, 4 * q + kv + 2 * lse + mask),
        Launch("_key_gradients_kernel", 4 * product, 2 * q + 2 * kv + 2 * lse + mask),
    )
    return Counts(6 * product, forward + backward, kernels)


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
