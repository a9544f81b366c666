"""How an implementation is checked and timed.

Checked before it is timed (``check``). Timed warm, on inputs that are not in the cache: as many copies, each drawn
anew, as fill it twice take turns. On CUDA the times are the device's (``clock``); `wall_seconds` beside them is the
host's and the device's time together.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from bench.predict import cards
from bench.predict.counts import Counts
from bench.run import clock
from bench.run.check import check, checked_tokens
from bench.run.memory import cache_bytes
from bench.run.work import Case, Inputs, Prepare, step

MOST_COPIES = 64
Drawn = TypeVar("Drawn", bound=Inputs)


def measure(
    benchmark,
    case: Case,
    implementation: str,
    prepare: Prepare,
    inputs: Callable[[int], Inputs],
    counted: Counts,
    formula: Callable | None = None,
    checked: Prepare | None = None,
) -> None:
    """Checks ``prepare`` against ``formula`` (None: it is a limit, which computes something else) and times it.

    inputs: number of tokens -> tensors drawn anew. counted: of the op, whoever computes it; of the limit its own.
    checked: what is checked in its place, where ``prepare`` draws random numbers that the formula cannot.
    """
    if formula is not None:
        check(checked or prepare, formula, inputs(checked_tokens(case, implementation)))
    runs = [step(prepare(*first)) for first in copies(lambda: inputs(case.tokens), case.device)]
    record(benchmark, case, implementation, rotation(runs), counted)


def copies(make: Callable[[], Drawn], device: str) -> list[Drawn]:
    """Returns as many draws of the inputs as fill the cache twice, so that none is in it when its turn comes."""
    first = make()
    size = sum(tensor.nbytes for tensor in first if tensor is not None)
    count = min(MOST_COPIES, 1 + 2 * cache_bytes(device) // max(1, size))
    return [first, *(make() for _ in range(count - 1))]


def rotation(runs: Sequence[Callable]) -> Callable[[], None]:
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def record(
    benchmark, case: Case, implementation: str, run: Callable, counted: Counts, peak_bytes: int | None = None
) -> None:
    """Times ``run``, and writes down its names and the work that cannot be avoided."""
    describe(benchmark, case, implementation, counted, peak_bytes)
    if case.device == "cuda":
        _record_cuda(benchmark, case, run, counted, implementation)
    else:
        benchmark.pedantic(run, rounds=case.rounds, iterations=1, warmup_rounds=max(1, case.rounds // 5))


def describe(benchmark, case: Case, implementation: str, counted: Counts, peak_bytes: int | None = None) -> None:
    benchmark.group = case.group
    benchmark.extra_info.update(
        op=case.op,
        shape=case.shape,
        case=case.case,
        dtype=case.dtype,
        tokens=case.tokens,
        implementation=implementation,
        flops=counted.flops,
        bytes=counted.bytes,
        launches=counted.launches if implementation == "ours" else None,
        peak_bytes=peak_bytes,
    )


def _record_cuda(benchmark, case: Case, run: Callable, counted: Counts, implementation: str) -> None:
    card = cards.device_of(torch.cuda.get_device_name())
    if card is not None and implementation in ("ours", "limit"):
        benchmark.extra_info["predicted_seconds"] = cards.predicted(counted, card, case.dtype)
    seconds, walls = clock.device_seconds(run, case.rounds)
    benchmark.extra_info |= {"wall_seconds": statistics.median(walls), "wall_samples": walls}
    clock.write_down(benchmark, seconds)
