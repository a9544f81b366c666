"""Measurements beside predictions, and the kernels of the H200's run that are other ones now."""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.predict.cards import Device, device_of, launch_seconds, predicted
from bench.predict.cases import WORK, work
from bench.predict.counts import Launch
from bench.show.measurements import Measurement, Run

# A prediction is kept where a card takes 0.8 to 1.25 of it.
KEPT = (0.8, 1.25)


class Replaced(NamedTuple):
    """Names the kernels of an op's cases with ``part`` in their shape or case: on the H200 then, and now."""

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
    """Yields measurements of ours, each with the seconds that are predicted for it.

    On a card of the table these are today's predictions, not those of the day of the run. A CPU's
    are those of one launch: its kernels are other ones, its rates the run's (`machine_info.rates`), or measured now.
    """
    device = device_of(run.machine.get("device") or "")
    for one in run.measurements:
        if one.implementation not in ("ours", "ours, 300 MiB of logits") or one.flops is None or one.bytes is None:
            continue
        seconds = _on_card(one, device) if device else _in_one_launch(one.flops, one.bytes, one.dtype, run.rates)
        if seconds is not None:
            yield one, seconds


def _on_card(one: Measurement, device: Device) -> float | None:
    if one.op not in WORK or not one.shape or one.tokens is None:
        return None
    case = ", ".join([one.case, *one.implementation.split(", ")[1:]])
    ours, _ = work(one.op, one.shape, case, one.tokens, 4 if one.dtype == "float32" else 2)
    return predicted(ours, device, one.dtype)


def compare(runs: Iterable[Run]) -> Iterator[tuple[str, int, float, float]]:
    """Yields (op, measurements, median of measured over predicted, standard deviation of its logarithm) of ours."""
    ratios = defaultdict(list)
    for one, seconds in (pair for run in runs for pair in against(run)):
        ratios[one.op].append(one.median / seconds)
    for op, found in sorted(ratios.items()):
        spread = statistics.stdev(map(math.log, found)) if len(found) > 1 else 0.0
        yield op, len(found), statistics.median(found), spread


def replaced(one: Measurement) -> Replaced | None:
    names = f"{one.shape} {one.case}"
    return next((each for each in REPLACED if each.op == one.op and each.part in names), None)


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
