"""Predicted seconds of every op, shape and card, from what bench/counts.py counts.

    python bench/model.py                       every op × shape × card: predicted time, ratio to the limit
    python bench/model.py --markdown            the same into the tables of docs/PERFORMANCE.md
    python bench/model.py --compare ops.json    predictions beside what a run measured, by op

    t(launch) = max(flops / (rate · fraction), bytes / (bandwidth · fraction), instructions / issue rate) + launch time

and a prediction is the sum over an op's launches. Published rates; an H200's fractions are fitted to its first run
(bench/results/nvidia-h200), those of the other cards are assumptions. What that run measured stands in the document
beside the predictions; REPLACED says which of its kernels are other ones now.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import counts
import lean_step
from counts import Counts, Launch
from measurements import LIMIT, Measurement, Run, by_op, load
from measurements import seconds as spelled
from shapes import NAMES, TOKENS, Shape, shape

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "PERFORMANCE.md"
RESULTS = Path(__file__).with_name("results") / "nvidia-h200"
# Our own main loops over the library's: 0.72 to 0.83 for LoRA's two products on an H200 (d = 2048 and 4096, r = 8 and
# 16), when its four passes over an activation are taken off the whole.
OURS = 0.75
# The share of the L2 cache that a working set may have.
L2_SHARE = 0.8


@dataclass(frozen=True)
class Device:
    """Dense bf16 and fp32 FLOP/s, bytes/s, bytes of L2 cache; the fractions of both rates that are reached; a launch.

    ``launch``: seconds from one kernel to the next in a full queue, with filling and draining the card.
    """

    bf16: float
    fp32: float
    bandwidth: float
    l2: int
    products: float
    copies: float
    launch: float = 3e-6

    def rate(self, dtype: str) -> float:
        return (self.fp32 if dtype == "float32" else self.bf16) * self.products

    @property
    def instructions(self) -> float:
        """Those of single threads a second: a multiply-add of fp32 is one."""
        return self.fp32 / 2


# NVIDIA's data sheets and architecture papers: A100 80GB SXM, H100 SXM5, H200 SXM, L4, Ada (RTX 4090; bf16 with sums in
# fp32). Without sparsity. An H200's fractions are those of its own copies and of the limits that are products (d = 768
# takes 1.24 times what they say, the others 0.96 to 1.12). L4's products are held back by 72 W.
DEVICES = {
    "A100 80GB": Device(312e12, 19.5e12, 2.039e12, 40 << 20, products=0.80, copies=0.85),
    "H100 SXM": Device(989e12, 67e12, 3.35e12, 50 << 20, products=0.70, copies=0.88),
    "H200": Device(989e12, 67e12, 4.8e12, 50 << 20, products=0.77, copies=0.86),
    "L4": Device(121e12, 30.3e12, 0.3e12, 48 << 20, products=0.55, copies=0.85),
    "RTX 4090": Device(165.2e12, 82.6e12, 1.008e12, 72 << 20, products=0.90, copies=0.90),
}


def device_of(card: str) -> Device | None:
    """The entry of a card by the name that CUDA gives it ("NVIDIA H200"), None where the table has none."""
    words = card.replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if _main_word(name) in words), None)


def _main_word(name: str) -> str:
    return name.split()[1] if name.startswith("RTX") else name.split()[0]


def launch_seconds(launch: Launch, device: Device, dtype: str = "bfloat16") -> float:
    rate = device.rate(dtype) * (1.0 if launch.library else OURS)
    fits = launch.working_set <= L2_SHARE * device.l2
    moved = launch.bytes - (launch.cached if fits else 0)
    work = (launch.flops / rate, moved / (device.bandwidth * device.copies), launch.instructions / device.instructions)
    return max(work) + device.launch


def predicted(counted: Counts, device: Device, dtype: str = "bfloat16") -> float | None:
    """Seconds, None where ours has no GPU kernel."""
    if counted.kernels is None:
        return None
    return sum(launch_seconds(launch, device, dtype) for launch in counted.kernels)


def lora_limit(device: Device, tokens: int, d: int, ranks: tuple[int, ...]) -> float:
    """What LoRA linears must take over the frozen ones in one product, forward and backward: their work, and one more
    read of x.

    Products at the rate that is reached, the read at the published bandwidth: nothing can be faster than that.
    """
    frozen = counts.frozen_linear(tokens, len(ranks) * d, d, 2)
    more = counts.lora_linear(tokens, d, [d] * len(ranks), ranks, 2).flops - frozen.flops
    base = predicted(frozen, device)
    return 1 + (more / device.rate("bfloat16") + 2 * tokens * d / device.bandwidth) / base


# ---- every op and shape ---------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A case of an op in the words of its benchmark, ours and the limit."""

    op: str
    shape: str
    case: str
    ours: Counts
    limit: Counts


def entries(tokens: int = TOKENS["cuda"], size: int = 2) -> Iterator[Entry]:
    """What the op benchmarks run on a GPU, in bf16 (their main cases), each beside its limit."""
    for name in NAMES:
        for op, case in _cases(name, tokens):
            yield Entry(op, name, case, *work(op, name, case, tokens, size))


def _cases(name: str, tokens: int) -> Iterator[tuple[str, str]]:
    gated = name in ("t5", "madlad-3b", "madlad-10b")
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
    return int(re.search(r"=(\d+)", case)[1])


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


# ---- output ---------------------------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, ...]]:
    """One for each op and size: models that have it stand together."""
    names = defaultdict(list)
    for entry in entries():
        names[entry._replace(shape="")].append(entry.shape)
    for entry, shapes in names.items():
        cells = []
        for device in DEVICES.values():
            ours, limit = predicted(entry.ours, device), predicted(entry.limit, device)
            cells.append(f"{_time(ours)} ({ours / limit:.2f})")
        yield entry.op, ", ".join(shapes), entry.case, *cells


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _fill(text: str, name: str, lines: list[tuple[str, ...]], numbers: int) -> str:
    """``text`` with the table between the two markers of ``name``; the last ``numbers`` columns are figures."""
    head, *body = lines
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
    before, rest = text.split(f"<!-- {name}: python bench/model.py --markdown -->")
    after = rest.split(f"<!-- end of {name} -->")[1]
    return f"{before}<!-- {name}: python bench/model.py --markdown -->\n\n{table}\n\n<!-- end of {name} -->{after}"


# What is asked for on an H200: microseconds, or what may be taken over the limit ("×").
ASKED = (
    ("lora_border", "nllb-600m", "r=16 q/v", 1.20, "×"),
    ("lora_border", "nllb-3.3b", "r=16 q/v", 1.10, "×"),
    ("lora_border", "wide", "r=16 q/v", 1.06, "×"),
    ("lora_linear", "nllb-600m", "r=16", 1.50, "×"),
    ("lora_linear", "nllb-3.3b", "r=16", 1.25, "×"),
    ("lora_linear", "wide", "r=16", 1.12, "×"),
    ("frozen_ffn", "nllb-600m", "relu", 430, "µs"),
    ("frozen_ffn", "nllb-600m", "gelu", 480, "µs"),
    ("attention", "nllb-600m", "64x128 dropout 0.1", 90, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=64 fwd", 25, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=64 fwd+bwd", 90, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=256 fwd+bwd", 140, "µs"),
    ("bottleneck_adapter", "nllb-600m", "m=1024 fwd+bwd", 240, "µs"),
    ("layer_norm", "nllb-600m", "trained", 60, "µs"),
    ("quantized_project", "nllb-600m", "int8 d x d", 1.15, "×"),
    ("quantized_project", "nllb-600m", "nf4 d x d", 1.15, "×"),
    ("quantized_project", "nllb-600m", "int8 ffn x d", 1.10, "×"),
    ("quantized_project", "nllb-600m", "nf4 ffn x d", 1.10, "×"),
    ("linear_cross_entropy", "nllb-600m", "smoothing 0.1, 300 MiB of logits", 15e3, "µs"),
    ("linear_cross_entropy", "nllb-600m", "smoothing 0.1, 32 MiB of logits", 18e3, "µs"),
)
LORA_RANKS = {"lora_border": (16, 0, 16), "lora_linear": (16,)}


def targets() -> Iterator[tuple[str, ...]]:
    """Returns what is asked for, the limit, what is predicted now, and what the H200 took with its run's kernels."""
    h200, t = DEVICES["H200"], TOKENS["cuda"]
    run = (one for one in load(RESULTS / "ops.json").measurements if one.tokens == t)
    timed = {(*one.key[:3], one.implementation): one.median for one in run}
    for op, name, case, asked, unit in ASKED:
        ours, limit = (predicted(each, h200) for each in work(op, name, case, t, 2))
        of_run = ((op, name, *_as_measured(case)), (op, name, case.split(",")[0], LIMIT))
        then, its_limit = (timed.get(key) for key in of_run)
        if unit == "×":
            least = lora_limit(h200, t, shape(name, "cuda").d, LORA_RANKS[op]) if op in LORA_RANKS else 1
            figures = f"≤ {asked:.2f}", f"{least:.2f}", f"{ours / limit:.2f}", f"{then / its_limit:.2f}" if then else ""
        else:
            figures = f"≤ {_time(asked / 1e6)}", _time(limit), _time(ours), _time(then) if then else ""
        yield op, name, case, *figures
    yield from _small_work(h200)
    for what, asked, seconds, then in _layers_and_steps(h200, t):
        yield what, "nllb-600m", "tier 1, LoRA r = 16 on q and v", f"≤ {asked}", "", _time(seconds), then


def _small_work(device: Device) -> Iterator[tuple[str, ...]]:
    """The targets of a token over a quantized weight (bitsandbytes' time) and of quantizing a weight (three copies)."""
    run = load(RESULTS / "ops.json").measurements
    of_run = {(one.op, one.case, one.tokens): one.median for one in run if one.implementation == "ours"}
    for storage, asked in (("int8", 39), ("nf4", 19)):
        op, case = "quantized_project", f"{storage} d x d"
        ours, limit = (predicted(each, device) for each in work(op, "nllb-600m", case, 1, 2))
        figures = f"≤ {asked} µs", _time(limit), _time(ours), _time(of_run[op, case, 1])
        yield op, "nllb-600m", f"{case}, one token", *figures
    copy = predicted(counts.streams(2, 4096 * 1024, 2), device)
    for storage in ("int8", "nf4"):
        ours = predicted(counts.quantize(4096, 1024, storage, 2), device)
        then = next(
            one.median for one in run if (one.op, one.case, one.implementation) == ("quantize", storage, "ours")
        )
        yield "quantize", "nllb-600m", storage, "≤ 24 µs", _time(copy), _time(ours), _time(then)


def _as_measured(case: str) -> tuple[str, str]:
    """Returns (case, implementation) of a benchmark; that of the loss has its bytes in the implementation's name."""
    if case.endswith("300 MiB of logits"):
        return case.split(",")[0], "ours, 300 MiB of logits"
    return case.removesuffix(", 32 MiB of logits"), "ours"


def _layers_and_steps(device: Device, t: int) -> Iterator[tuple[str, str, float, str]]:
    """(what, asked, predicted seconds of the device, measured) of layers and of a step with a loss in 300 MiB."""
    layers = {(one.case, one.implementation): one for one in load(RESULTS / "layers.json").measurements}
    s = shape("nllb-600m", "cuda")
    sides = {"encoder": lean_step.encoder_layer(s, t), "decoder": lean_step.decoder_layer(s, t, t)}
    for (side, ops), asked in zip(sides.items(), ("800 µs", "1.15 ms"), strict=True):
        then = layers[f"{side} LoRA r=16", "ours"].median
        yield f"one {side} layer", asked, predicted(lean_step.total(ops), device), _time(then)
    parts = lean_step.step("nllb-600m", t, t, 300 << 20)
    yield "a whole step, by the clock", "45 ms", sum(predicted(part, device) for part in parts.values()), ""


def write_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head = ("what", "shape", "case", "asked", "limit", "predicted", "measured at aaa4494")
    text = _fill(text, "targets", [head, *targets()], 4)
    text = _fill(text, "layers", [LAYER_HEAD, *layer_rows()], len(LAYER_HEAD) - 2)
    text = _fill(text, "measured", [MEASURED_HEAD, *measured_rows()], len(MEASURED_HEAD) - 3)
    text = _fill(text, "replaced", [("op", "case", "what was measured at aaa4494", "now"), *REPLACED], 0)
    text = _fill(text, "predictions", [("op", "shape", "case", *DEVICES), *rows()], len(DEVICES))
    table = [("card", "bf16, TFLOP/s", "fp32, TFLOP/s", "memory, TB/s", "L2, MiB", "products reach", "copies reach")]
    for name, device in DEVICES.items():
        rates = (device.bf16 / 1e12, device.fp32 / 1e12, device.bandwidth / 1e12, device.l2 >> 20)
        fractions = (f"{device.products:.0%}", f"{device.copies:.0%}")
        table.append((name, *(f"{rate:g}" for rate in rates), *fractions))
    DOCUMENT.write_text(_fill(text, "cards", table, 6), encoding="utf-8")


# ---- against measurements -------------------------------------------------------------------------------------------

# A prediction is kept where a card takes 0.8 to 1.25 of it.
KEPT = (0.8, 1.25)


class Replaced(NamedTuple):
    """What an op's cases that have ``part`` in their shape and case were on the H200, and what stands there now."""

    op: str
    part: str
    then: str
    now: str


# The first that fits a case is its own. None is a fraction of the card: they were faults of kernels.
REPLACED = (
    Replaced("activation", "p=0.1", "a mask of 22 instructions an element", "of 12"),
    Replaced("attention", "", "scores made three times, the mask drawn five times", "a sentence's gradients in one"),
    Replaced("bottleneck_adapter", "m=1024", "a block of 64 hidden units reads x and dy, 16 times in all", "cuBLAS"),
    Replaced("bottleneck_adapter", "", "64 programs add the parts of sums; a data race", "one part beside the other"),
    Replaced("frozen_ffn", "", "two chunks; passes of 160 µs for 69 of bytes", "ReLU in its product, other passes"),
    Replaced("layer_norm", "frozen", "three sums across the warps of a row", "a row is one warp's"),
    Replaced(
        "layer_norm", "trained", "the sums over tokens read x and dy again, at 0.5 TB/s", "they ride in dx's pass"
    ),
    Replaced("rms_norm", "trained", "as layer_norm", "as layer_norm"),
    Replaced(
        "linear_cross_entropy", "", "by rows, with products over 256,206 words", "by words, 64 or a multiple at a time"
    ),
    Replaced(
        "lora_linear", "", "products of ours at 0.75 of cuBLAS, four skinny passes", "cuBLAS, three skinny passes"
    ),
    Replaced("parallel_ffn", "m=256", "the adapter's gradients by the adapter's kernels", "by cuBLAS"),
    Replaced(
        "quantized_project", "", "the reference served, for the check had failed", "Triton; a kernel for few rows"
    ),
)


def against(run: Run) -> Iterator[tuple[Measurement, float]]:
    """Measurements of ours, each with the seconds that are predicted for it.

    On a card of the table these are the seconds that this file says, whatever it said on the day of the run. A CPU's
    are those of one launch: its kernels are other ones, its rates the run's (`machine_info.rates`), or measured now.
    """
    device = device_of(run.machine.get("device") or "")
    for one in run.measurements:
        if one.implementation not in ("ours", "ours, 300 MiB of logits") or one.flops is None:
            continue
        seconds = _on_card(one, device) if device else _in_one_launch(one.flops, one.bytes, one.dtype, run.rates)
        if seconds is not None:
            yield one, seconds


def _on_card(one: Measurement, device: Device) -> float | None:
    if one.op not in WORK or not one.shape:
        return None
    case = ", ".join([one.case, *one.implementation.split(", ")[1:]])
    ours, _ = work(one.op, one.shape, case, one.tokens, 4 if one.dtype == "float32" else 2)
    return predicted(ours, device, one.dtype)


def compare(path: Path) -> Iterator[tuple[str, int, float, float]]:
    """(op, measurements, median of measured over predicted, standard deviation of its logarithm) of ours."""
    ratios = defaultdict(list)
    for one, seconds in against(load(path)):
        ratios[one.op].append(one.median / seconds)
    for op, found in sorted(ratios.items()):
        spread = statistics.stdev(map(math.log, found)) if len(found) > 1 else 0.0
        yield op, len(found), statistics.median(found), spread


def replaced(one: Measurement) -> Replaced | None:
    names = f"{one.shape} {one.case}"
    return next((each for each in REPLACED if each.op == one.op and each.part in names), None)


MEASURED_HEAD = (
    "op", "shape", "case", "limit", "ours", "ours / limit", "predicted now", "fastest other", "ours, wall",
    "the other, wall",
)  # fmt: skip


def measured_rows(path: Path = RESULTS / "ops.json") -> Iterator[tuple[str, ...]]:
    """A row for each case of a card's run; the device's times, and the host's and the device's together ("wall")."""
    run = load(path)
    expected = {one.key: predicted_seconds for one, predicted_seconds in against(run)}
    for case in (case for cases in by_op(run.measurements).values() for case in cases):
        limit = next(one for one in case if one.kind == LIMIT)
        others = [one for one in case if one.kind == "peer"]
        other = min(others, key=lambda one: one.median) if others else None
        beside = (f"{spelled(other.median)} ({other.implementation})", spelled(other.wall)) if other else ("", "")
        names = (limit.op, limit.shape, limit.case + (", one token" if limit.tokens == 1 else ""))
        ours = [one for one in case if one.is_ours]
        if not ours:
            yield *names, spelled(limit.median), "not timed", "", "", beside[0], "", beside[1]
        for one in ours:
            more = one.implementation.removeprefix("ours")
            now = spelled(expected[one.key]) if one.key in expected else ""
            figures = (spelled(one.median), f"{one.median / limit.median:.2f}", now, beside[0])
            yield *names[:2], names[2] + more, spelled(limit.median), *figures, spelled(one.wall), beside[1]


LAYER_HEAD = ("layer", "implementation", "device", "over the frozen layer", "wall", "over the frozen layer's")


def layer_rows(path: Path = RESULTS / "layers.json") -> Iterator[tuple[str, ...]]:
    for case in by_op(load(path).measurements)["layer"]:
        limit = next(one for one in case if one.kind == LIMIT)
        for one in case:
            name = "frozen, the model's own" if one is limit else one.implementation
            ratios = (f"{one.median / limit.median:.2f}", f"{one.wall / limit.wall:.2f}")
            times = (f"{one.median * 1e3:.2f} ms", f"{one.wall * 1e3:.1f} ms")
            yield f"{one.shape} {one.case}", name, times[0], ratios[0], times[1], ratios[1]


def _in_one_launch(flops: int, moved: int, dtype: str, rates: dict | None) -> float:
    products, copies = (rates["matmul"][dtype], rates["copy"]) if rates else _measured(dtype)
    device = Device(products, products, copies, 0, products=1.0, copies=1.0, launch=0.0)
    return launch_seconds(Launch("", flops, moved, library=True), device, dtype)


@functools.cache
def _measured(dtype: str) -> tuple[float, float]:
    """(FLOP/s of products, bytes/s of copies) of this machine's CPU, now."""
    import torch

    from petl_kernels.planning.cost import measure_rates

    rates = measure_rates(torch.device("cpu"), getattr(torch, dtype))
    return rates.products, rates.memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help=f"write the tables of docs/{DOCUMENT.name}")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="a run's results beside the predictions")
    arguments = parser.parse_args()
    if arguments.compare:
        print(f"{'op':24s} {'runs':>4s} {'measured / predicted':>21s} {'spread':>7s}")
        for op, runs, ratio, spread in compare(arguments.compare):
            print(f"{op:24s} {runs:4d} {ratio:21.2f} {math.exp(spread):6.2f}x")
    elif arguments.markdown:
        write_document()
    else:
        print(f"{'op':22s}{'shape':34s}{'case':24s}" + "".join(f"{name:>20s}" for name in DEVICES))
        for op, name, case, *cells in rows():
            print(f"{op:22s}{name:34s}{case:24s}" + "".join(f"{cell:>20s}" for cell in cells))


if __name__ == "__main__":
    main()
