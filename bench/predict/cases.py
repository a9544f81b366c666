"""The cases of the op benchmarks on a GPU, named as the benchmarks name them: work of ours and of the limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from bench.predict import counts
from bench.predict.cards import Device, seconds_of
from bench.predict.counts import Counts, Launch
from bench.shapes import NAMES, T5_MODELS, TOKENS, Shape, shape


class Entry(NamedTuple):
    """A case of an op in the words of its benchmark, ours and the limit."""

    op: str
    shape: str
    case: str
    ours: Counts
    limit: Counts


def entries(tokens: int = TOKENS["cuda"], size: int = 2) -> Iterator[Entry]:
    """Yields the cases of the op benchmarks on a GPU in bf16, each beside its limit."""
    for name in NAMES:
        for op, case in _cases(name, tokens):
            yield Entry(op, name, case, *work(op, name, case, tokens, size))


def _cases(name: str, tokens: int) -> Iterator[tuple[str, str]]:
    gated = name in T5_MODELS
    yield "frozen_linear", ""
    for case in ("r=8", "r=16", "r=64", "r=16 q/k/v"):
        yield "lora_linear", case
    yield "lora_border", "r=16 q/v"
    for m in (64, 256, 1024):
        yield "bottleneck_adapter", f"m={m} fwd"
        yield "bottleneck_adapter", f"m={m} fwd+bwd"
    yield "frozen_ffn", "gelu_tanh gated" if gated else "relu"
    if gated:
        yield "gated_activation", "gelu_tanh"
        yield "rms_norm", "frozen"
        yield "rms_norm", "trained"
    else:
        yield from (("parallel_ffn", f"relu m={m}") for m in (64, 256))
        yield "activation", "relu p=0"
        yield "layer_norm", "frozen"
        yield "layer_norm", "trained"
    yield "dropout_add", "p=0.1"
    yield "dropout_add_norm", "frozen"
    if shape(name, "cuda").head_dim <= 128:  # wider heads have no kernel of ours
        yield "attention", f"{tokens // 128}x128 dropout 0"
        yield "attention", f"{tokens // 128}x128 dropout 0.1"
    for storage in ("int8", "nf4"):
        yield from (("quantized_project", f"{storage} {matrix}") for matrix in ("d x d", "ffn x d"))
    for chunk in (32, 300):
        yield "linear_cross_entropy", f"smoothing 0.1, {chunk} MiB of logits"


def work(op: str, name: str, case: str, tokens: int, size: int) -> tuple[Counts, Counts]:
    """(ours, limit) of a benchmark's case, named as it names it; KeyError for an op that is not counted."""
    return WORK[op](shape(name, "cuda"), case, tokens, size)


def _frozen_linear(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    frozen = counts.frozen_linear(t, s.d, s.d, size)  # the library's by default
    return frozen, frozen


def _lora_linear(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    groups = 3 if case.endswith("q/k/v") else 1
    ours = counts.lora_linear(t, s.d, [s.d] * groups, [_number(case)] * groups, size)
    return ours, counts.total([counts.frozen_linear(t, s.d, s.d, size)] * groups)


def _lora_border(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    """q, k and v as a layer has them, with LoRA on q and v, over the frozen three in one product."""
    rank = _number(case)
    ours = counts.lora_border(t, s.d, [s.d] * 3, [rank, 0, rank], size)
    return ours, counts.frozen_linear(t, 3 * s.d, s.d, size)


def _bottleneck_adapter(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    backward = case.endswith("bwd")
    ours = counts.bottleneck_adapter(t, s.d, _number(case), size, backward)
    return ours, _passes(t * s.d, size, 2, *([3] if backward else []))


def _frozen_ffn(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    kind, *gated = case.split()
    return counts.frozen_ffn(t, s.d, s.ffn, kind, bool(gated), size), _products(t, s.d, s.ffn, 2 + len(gated), size)


def _parallel_ffn(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    ours = counts.parallel_ffn(t, s.d, s.ffn, _number(case), case.split()[0], size)
    return ours, _products(t, s.d, s.ffn, 2, size)


def _activation(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    kind, p = case.split(" p=")
    return counts.activation(t, s.ffn, kind, size, float(p) > 0), _passes(t * s.ffn, size, 2, 2)


def _gated_activation(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    return counts.gated_activation(t, s.ffn, size), _passes(t * s.ffn, size, 3, 5)


def _layer_norm(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    return counts.layer_norm(t, s.d, size, case == "trained"), _passes(t * s.d, size, 2, 3)


def _rms_norm(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    return counts.rms_norm(t, s.d, size, case == "trained"), _passes(t * s.d, size, 2, 3)


def _dropout_add(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    return counts.dropout_add(t, s.d, size), _passes(t * s.d, size, 3, 2)


def _dropout_add_norm(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    return counts.dropout_add_norm(t, s.d, size, case == "trained"), _passes(t * s.d, size, 4, 5)


def _attention(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    rows, length = map(int, case.split()[0].split("x"))
    dropout = not case.endswith(" 0")
    scores = counts.attention(rows, s.heads, length, length, s.head_dim, size, mask=rows * length, dropout=dropout)
    return scores, once(scores, 2)


def _quantized_project(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    storage, matrix = case.split(maxsplit=1)
    n, k = ({"d": s.d, "ffn": s.ffn}[side] for side in matrix.split(" x "))
    return counts.quantized_project(t, n, k, storage, size), counts.frozen_linear(t, n, k, size)


def _linear_cross_entropy(s: Shape, case: str, t: int, size: int) -> tuple[Counts, Counts]:
    chunk = 300 if "300 MiB" in case else 32
    loss = counts.linear_cross_entropy(t, s.d, s.words, size, chunk << 20)
    return loss, products_of_head(t, s.d, s.words, size)


WORK = {
    "frozen_linear": _frozen_linear,
    "lora_linear": _lora_linear,
    "lora_border": _lora_border,
    "bottleneck_adapter": _bottleneck_adapter,
    "frozen_ffn": _frozen_ffn,
    "parallel_ffn": _parallel_ffn,
    "activation": _activation,
    "gated_activation": _gated_activation,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "dropout_add": _dropout_add,
    "dropout_add_norm": _dropout_add_norm,
    "attention": _attention,
    "quantized_project": _quantized_project,
    "linear_cross_entropy": _linear_cross_entropy,
}


def _number(case: str) -> int:
    found = re.search(r"=(\d+)", case)
    assert found is not None, case
    return int(found[1])


def _passes(elements: int, size: int, *arrays: int) -> Counts:
    total = counts.streams(arrays[0], elements, size)
    for count in arrays[1:]:
        total += counts.streams(count, elements, size)
    return total


def _products(t: int, d: int, f: int, weights: int, size: int) -> Counts:
    both = counts.frozen_linear(t, f, d, size)
    return both + both + both if weights == 3 else both + both


def once(counted: Counts, launches: int) -> Counts:
    """An op's own operations and bytes in so many launches of the library's."""
    part = Launch("library pass", counted.flops // launches, counted.bytes // launches, library=True)
    return Counts(counted.flops, counted.bytes, (part,) * launches)


def products_of_head(t: int, d: int, words: int, size: int) -> Counts:
    """The two products alone, without their logits."""
    product = 2 * t * d * words
    part = Launch("library product", product, size * (words * d + t * d), library=True)
    return Counts(2 * product, 2 * part.bytes, (part, part))


def lora_limit(device: Device, tokens: int, d: int, ranks: tuple[int, ...]) -> float:
    """Returns what LoRA linears must take over the frozen ones in one product, forward and backward.

    They have more work, and one more read of x.
    Products at the rate that is reached, the read at the published bandwidth: nothing can be faster than that.
    """
    frozen = counts.frozen_linear(tokens, len(ranks) * d, d, 2)
    more = counts.lora_linear(tokens, d, [d] * len(ranks), ranks, 2).flops - frozen.flops
    base = seconds_of(frozen, device)
    return 1 + (more / device.rate("bfloat16") + 2 * tokens * d / device.bandwidth) / base
