"""Predicted seconds of every op, shape and card, from what bench/counts.py counts.

    python bench/model.py                       every op × shape × card: predicted time, ratio to the limit
    python bench/model.py --markdown            the same into the tables of docs/PERFORMANCE.md
    python bench/model.py --compare ops.json    predictions beside what a run measured, by op

    t(launch) = max(flops / (rate · fraction), bytes / (bandwidth · fraction), instructions / issue rate) + launch time

and a prediction is the sum over an op's launches. Published rates; the fractions are assumptions until a card corrects
them (`--compare` on a card's results).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import counts
from counts import Counts, Launch
from shapes import NAMES, TOKENS, shape

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "PERFORMANCE.md"
# Our own main loops over the library's (bench/NOTES.md: 26 to 29 µs where cuBLAS takes 22); no tile is tuned yet.
OURS = 0.8
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
# fp32). Without sparsity. The fractions of an H200 are those of bench/NOTES.md; L4's products are held back by 72 W.
DEVICES = {
    "A100 80GB": Device(312e12, 19.5e12, 2.039e12, 40 << 20, products=0.80, copies=0.85),
    "H100 SXM": Device(989e12, 67e12, 3.35e12, 50 << 20, products=0.70, copies=0.88),
    "H200": Device(989e12, 67e12, 4.8e12, 50 << 20, products=0.80, copies=0.83),
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


def lora_limit(device: Device, tokens: int, d: int, rank: int) -> float:
    """What a LoRA linear must take over the frozen one, forward and backward: 3r/d more work and one more read of x.

    Products at the rate that is reached, the read at the published bandwidth: nothing can be faster than that.
    """
    frozen = counts.frozen_linear_library(tokens, d, d, 2)
    more = counts.lora_linear(tokens, d, [d], [rank], 2).flops - frozen.flops
    base = predicted(frozen, device)
    return 1 + (more / device.rate("bfloat16") + 2 * tokens * d / device.bandwidth) / base


# ---- every op and shape ---------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    op: str
    shape: str
    case: str
    ours: Counts
    limit: Counts


def entries(tokens: int = TOKENS["cuda"], size: int = 2) -> Iterator[Entry]:
    """What the op benchmarks run on a GPU, in bf16, each beside its limit."""
    for name in NAMES:
        yield from _entries(name, tokens, size)


def _entries(name: str, t: int, size: int) -> Iterator[Entry]:
    s = shape(name, "cuda")
    d, f = s.d, s.ffn
    frozen = counts.frozen_linear_library(t, d, d, size)
    yield Entry("frozen_linear", name, "", frozen, frozen)  # the library's by default
    for rank in (8, 16, 64):
        yield Entry("lora_linear", name, f"r={rank}", counts.lora_linear(t, d, [d], [rank], size), frozen)
    grouped = counts.lora_linear(t, d, [d] * 3, [16] * 3, size)
    yield Entry("lora_linear", name, "r=16 q/k/v, one group", grouped, frozen + frozen + frozen)
    for m in (64, 256, 1024):
        for backward in (False, True):
            case = f"m={m} {'fwd+bwd' if backward else 'fwd'}"
            adapter = counts.bottleneck_adapter(t, d, m, size, backward)
            yield Entry("bottleneck_adapter", name, case, adapter, _passes(t * d, size, 2, *([3] if backward else [])))
    gated = name in ("t5", "madlad-3b", "madlad-10b")
    kind = "gelu_tanh" if gated else "relu"
    ffn = counts.frozen_ffn(t, d, f, kind, gated, size)
    yield Entry(
        "frozen_ffn", name, kind + (" gated" if gated else ""), ffn, _products(t, d, f, 3 if gated else 2, size)
    )
    if not gated:
        for m in (64, 256):
            wide = counts.parallel_ffn(t, d, f, m, kind, size)
            yield Entry("parallel_ffn", name, f"{kind} m={m}", wide, _products(t, d, f, 2, size))
    if gated:
        yield Entry("gated_activation", name, kind, counts.gated_activation(t, f, size), _passes(t * f, size, 3, 5))
        yield Entry("rms_norm", name, "frozen", counts.rms_norm(t, d, size), _passes(t * d, size, 2, 3))
    else:
        yield Entry("activation", name, "relu", counts.activation(t, f, "relu", size), _passes(t * f, size, 2, 2))
        yield Entry("layer_norm", name, "frozen", counts.layer_norm(t, d, size), _passes(t * d, size, 2, 3))
    yield Entry("dropout_add", name, "p=0.1", counts.dropout_add(t, d, size), _passes(t * d, size, 3, 2))
    if s.head_dim <= 128:  # wider heads have no kernel of ours
        scores = counts.attention(t // 128, s.heads, 128, 128, s.head_dim, size)
        yield Entry("attention", name, "length 128", scores, once(scores, 2))
    for storage in ("int8", "nf4"):
        yield Entry("quantised_project", name, storage, counts.quantised_project(t, d, d, storage, size), frozen)
    for chunk in (32, 300):
        loss = counts.linear_cross_entropy(t, d, s.words, size, chunk << 20)
        yield Entry("linear_cross_entropy", name, f"{chunk} MiB", loss, products_of_head(t, d, s.words, size))


def _passes(elements: int, size: int, *arrays: int) -> Counts:
    total = counts.streams(arrays[0], elements, size)
    for count in arrays[1:]:
        total += counts.streams(count, elements, size)
    return total


def _products(t: int, d: int, f: int, weights: int, size: int) -> Counts:
    both = counts.frozen_linear_library(t, f, d, size)
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


def targets() -> Iterator[tuple[str, ...]]:
    """DESIGN §7's figures that the model can say something about, on the card that they are set for."""
    h200, t = DEVICES["H200"], TOKENS["cuda"]
    for d, target in ((1024, 1.20), (2048, 1.10), (4096, 1.06)):
        ours = predicted(counts.lora_linear(t, d, [d], [16], 2), h200)
        ratio = ours / predicted(counts.frozen_linear_library(t, d, d, 2), h200)
        what = f"LoRA linear over the frozen one, d = {d}, r = 16, forward + backward"
        yield what, f"≤ {target:.2f}", f"{lora_limit(h200, t, d, 16):.2f}", f"{ratio:.2f}", ""
    adapter = predicted(counts.bottleneck_adapter(t, 1024, 64, 2, backward=False), h200)
    ratio = adapter / predicted(counts.streams(2, t * 1024, 2), h200)
    yield "adapter m = 64 over a copy, d = 1024, forward", "≤ 1.50", "1.00", f"{ratio:.2f}", ""
    for chunk, target in ((300, 20), (32, 28)):
        loss = predicted(counts.linear_cross_entropy(t, 1024, 256206, 2, chunk << 20), h200)
        limit = predicted(products_of_head(t, 1024, 256206, 2), h200)
        what = f"vocabulary loss, {t} × 1024 × 256,206, with backward, {chunk} MiB of logits"
        yield what, f"≤ {target} ms", f"{limit * 1e3:.1f} ms", f"{loss * 1e3:.1f} ms", ""


def write_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head = ("what", "target", "limit", "predicted, H200", "measured, H200")
    text = _fill(text, "targets", [head, *targets()], 4)
    text = _fill(text, "predictions", [("op", "shape", "case", *DEVICES), *rows()], len(DEVICES))
    table = [("card", "bf16, TFLOP/s", "fp32, TFLOP/s", "memory, TB/s", "L2, MiB", "products reach", "copies reach")]
    for name, device in DEVICES.items():
        rates = (device.bf16 / 1e12, device.fp32 / 1e12, device.bandwidth / 1e12, device.l2 >> 20)
        fractions = (f"{device.products:.0%}", f"{device.copies:.0%}")
        table.append((name, *(f"{rate:g}" for rate in rates), *fractions))
    DOCUMENT.write_text(_fill(text, "cards", table, 6), encoding="utf-8")


# ---- against measurements -------------------------------------------------------------------------------------------


def compare(path: Path) -> Iterator[tuple[str, int, float, float]]:
    """(op, measurements, median of measured over predicted, standard deviation of its logarithm) of ``ours``.

    A card of the table has its prediction in each measurement. A CPU's is that of one launch: its kernels are other
    ones, its rates the run's (`machine_info.rates`), or measured now.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    rates = run["machine_info"].get("rates")
    ratios = defaultdict(list)
    for bench in run["benchmarks"]:
        info, measured = bench["extra_info"], bench["stats"]["median"]
        if info.get("implementation") != "ours" or info.get("flops") is None:
            continue
        dtype = info.get("dtype") or ("float32" if "float32" in bench["group"] else "bfloat16")
        seconds = info.get("predicted_seconds") or _in_one_launch(info["flops"], info["bytes"], dtype, rates)
        ratios[info["op"]].append(measured / seconds)
    for op, found in sorted(ratios.items()):
        spread = statistics.stdev(map(math.log, found)) if len(found) > 1 else 0.0
        yield op, len(found), statistics.median(found), spread


def _in_one_launch(flops: int, moved: int, dtype: str, rates: dict | None) -> float:
    products, copies = (rates["matmul"][dtype], rates["copy"]) if rates else _measured(dtype)
    device = Device(products, products, copies, 0, products=1.0, copies=1.0, launch=0.0)
    return launch_seconds(Launch("", flops, moved, library=True), device, dtype)


@functools.cache
def _measured(dtype: str) -> tuple[float, float]:
    """(FLOP/s of products, bytes/s of copies) of this machine's CPU, now."""
    import torch

    from petl_kernels.memory.cost import measure_rates

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
