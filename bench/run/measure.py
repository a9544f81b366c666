"""How an implementation is checked and timed.

Checked before it is timed: values and gradients on fresh random inputs against the formula in float64; its error may be
at most twice the one that the formula itself makes in the inputs' dtype. Timed warm, on inputs that are not in the
cache: as many copies, each drawn anew, as fill it twice take turns. On CUDA the times are the device's, between events,
with a queue that is filled before the first of them, and no synchronisation between rounds; what no queue holds, such
as a whole step, is timed by the profiler. `wall_seconds` beside them is the host's and the device's time together.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.predict import cards
from bench.predict.counts import Counts
from bench.shapes import runs_on

CHECKED_ROWS = 64  # of a CPU's inputs, whose products in float64 would take longer than all that is timed
MOST_COPIES = 64


@dataclass(frozen=True)
class Case:
    """What one measurement is of; the names are those of bench/shapes.py and of the report."""

    op: str
    shape: str
    tokens: int
    dtype: str
    device: str
    case: str = ""
    rounds: int = 15

    @property
    def group(self) -> str:
        return " ".join(part for part in (self.op, self.shape, self.case, f"{self.tokens} tokens", self.dtype) if part)


@dataclass(frozen=True)
class Work:
    """A call to be differentiated: its outputs, and the leaves whose gradients a step forms (none: forward alone)."""

    forward: Callable[[], Tensor | Sequence[Tensor]]
    leaves: tuple[Tensor, ...] = ()


Inputs = tuple[Tensor | None, ...]
Prepare = Callable[..., Work]


def differentiated(function: Callable) -> Prepare:
    """``function(*inputs)``, and the gradients of those inputs that ask for one."""

    def prepare(*inputs: Tensor | None) -> Work:
        return Work(lambda: function(*inputs), leaves_of(inputs))

    return prepare


def forward_only(function: Callable) -> Prepare:
    return lambda *inputs: Work(lambda: function(*inputs))


def passes(*arrays: int) -> Prepare:
    """A limit that does nothing but move bytes: for each number a pass over as many arrays of the first input's size.

    Two are a copy, three a sum, four two copies, five a sum and a copy. Into memory that stands: a limit has nothing to
    allocate.
    """

    def prepare(x: Tensor, *_: Tensor | None) -> Work:
        x = x.detach()
        other, out = torch.randn_like(x), torch.empty_like(x)
        copy, add = (lambda: out.copy_(x)), (lambda: torch.add(x, other, out=out))
        parts = [part for count in arrays for part in {2: [copy], 3: [add], 4: [copy, copy], 5: [add, copy]}[count]]
        return Work(lambda: [part() for part in parts])

    return prepare


def leaves_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor is not None and tensor.requires_grad)


def peer(name: str):
    """A parameter that is skipped unless peers are asked for."""
    return pytest.param(name, marks=pytest.mark.peer)


def installed(module: str, name: str, device: str = "cuda"):
    """A peer's module, or a skip that says the peer's name. device: "cpu" for those whose kernels need a GPU."""
    if device == "cpu":
        pytest.skip(f"{name} needs a GPU")
    return pytest.importorskip(module, reason=f"{name} is not installed", exc_type=ImportError)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def require(name: str, device: str, implementation: str, small: bool = True) -> None:
    """Skip what a CPU has no patience for.

    Those are shapes that are not its own; cases that are not ``small``, but for nllb-600m; and compiling, which takes
    longer than all else together, but for nllb-600m's small cases.
    """
    first = name == "nllb-600m"
    patient = small and first if implementation == "torch.compile" else small or first
    if device == "cpu" and not (runs_on(name, device) and patient):
        pytest.skip("a CPU runs fewer shapes and cases: see bench/shapes.py")


# ---- correctness ----------------------------------------------------------------------------------------------------


def check(prepare: Prepare, formula: Callable, inputs: Inputs) -> None:
    """Raise AssertionError where ``prepare`` is further from ``formula`` in float64 than twice ``formula`` in dtype."""
    found = outcome(prepare(*copied(inputs)))
    reference = outcome(differentiated(formula)(*copied(inputs)))
    exact = outcome(differentiated(formula)(*copied(inputs, torch.float64)))
    reference, exact = reference[: len(found)], exact[: len(found)]  # forward alone has no gradients
    for index, (ours, theirs, true) in enumerate(zip(found, reference, exact, strict=True)):
        assert close(ours, theirs, true), f"output or gradient {index} differs: {error(ours, true):.2e} relative"


def outcome(work: Work) -> list[Tensor]:
    """Outputs, then gradients for ones that are random but the same each time."""
    outputs = _list(work.forward())
    if not work.leaves:
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    gradients = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, work.leaves, gradients))


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same values in tensors of their own, floating-point ones in ``dtype``."""
    return tuple(tensor if tensor is None else _copied(tensor, dtype) for tensor in inputs)


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    fresh = tensor.detach().clone()
    if dtype is not None and fresh.is_floating_point():
        fresh = fresh.to(dtype)
    return fresh.requires_grad_(tensor.requires_grad)


def close(ours: Tensor, reference: Tensor, exact: Tensor) -> bool:
    """Whether our error against float64 is at most twice the reference's own (and a floor)."""
    return error(ours, exact) <= 2 * error(reference, exact) + 1e-6


def error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def checked_tokens(case: Case, implementation: str) -> int:
    whole = case.device == "cuda" or implementation == "torch.compile"  # which would compile anew for fewer
    return case.tokens if whole else min(case.tokens, CHECKED_ROWS)


# ---- time -----------------------------------------------------------------------------------------------------------


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
    """Check ``prepare`` against ``formula`` (None: it is a limit, which computes something else) and time it.

    inputs: number of tokens -> tensors drawn anew. counted: of the op, whoever computes it; of the limit its own.
    checked: what is checked in its place, where ``prepare`` draws random numbers that the formula cannot.
    """
    if formula is not None:
        check(checked or prepare, formula, inputs(checked_tokens(case, implementation)))
    runs = [step(prepare(*first)) for first in copies(lambda: inputs(case.tokens), case.device)]
    record(benchmark, case, implementation, rotation(runs), counted)


def copies(make: Callable[[], Inputs], device: str) -> list[Inputs]:
    """As many draws of the inputs as fill the cache twice, so that none is in it when its turn comes."""
    first = make()
    size = sum(tensor.nbytes for tensor in first if tensor is not None)
    count = min(MOST_COPIES, 1 + 2 * cache_bytes(device) // max(1, size))
    return [first, *(make() for _ in range(count - 1))]


def cache_bytes(device: str) -> int:
    """The L2 cache of a GPU, the last-level cache of a CPU (32 MiB where the system does not say)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def step(work: Work) -> Callable[[], None]:
    """Forward and the leaves' gradients, for a gradient drawn once; without leaves, forward outside autograd."""
    if not work.leaves:
        return torch.no_grad()(work.forward)
    gradients = [torch.randn_like(y) for y in _list(work.forward())]
    return lambda: torch.autograd.grad(_list(work.forward()), work.leaves, gradients)


def rotation(runs: Sequence[Callable]) -> Callable[[], None]:
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def record(
    benchmark, case: Case, implementation: str, run: Callable, counted: Counts, peak_bytes: int | None = None
) -> None:
    """Time ``run`` and write down what it is, and the work that cannot be avoided."""
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
    seconds, walls = device_seconds(run, case.rounds)
    benchmark.extra_info |= {"wall_seconds": statistics.median(walls), "wall_samples": walls}
    times = itertools.accumulate(itertools.chain(*([0.0, each] for each in seconds)))
    benchmark._timer = lambda: next(times)  # the fixture reads it before and after each round, which has run already
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)


def device_seconds(run: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """(the device's seconds of each round, the host's and the device's together of some)

    Where neither a queue nor the profiler can tell them apart, the second are also the first.
    """
    for _ in range(max(3, rounds // 5)):
        run()
    hosts, walls = [], []
    for _ in range(max(3, rounds // 3)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - began)
    seconds = queued_seconds(run, rounds, 2 * statistics.median(hosts))
    return seconds or busy_seconds(run, rounds) or walls, walls


def queued_seconds(run: Callable, rounds: int, ahead: float) -> list[float]:
    """Seconds of each round between events in a queue that the device starts on ``ahead`` seconds later.

    The device sleeps while the host fills the queue, or the time between two events would be the host's. Empty where it
    was: a run that synchronises by itself, or has more launches than the queue holds (about a thousand).
    """
    events, late = [], 0
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2.5e9 * ahead))  # cycles: clocks are below 2.5 GHz
        start.record()
        run()
        late += start.query()  # the device was there before the host had queued all of the run
        stop.record()
        events.append((start, stop))
        if late > rounds // 5:
            return []
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def busy_seconds(run: Callable, rounds: int) -> list[float]:
    """Seconds of each round in which the device had something to do, by PyTorch's profiler; empty if it sees none."""
    found = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            run()
            torch.cuda.synchronize()
        on_device = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        found.append(covered([(event.time_range.start, event.time_range.end) for event in on_device]) / 1e6)
    return found if all(found) else []


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of ``spans``, each from start to end."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(run: Callable, device: str) -> int:
    """The most bytes that ``run`` takes beside what is there: of the allocator on a GPU, of the process on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or what an earlier run has freed would serve this one, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # forgets the process' peak
    before = _process_bytes("VmRSS")
    run()
    return _process_bytes("VmHWM") - before


def _process_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
