"""Seconds of a card, apart from the host's.

Between events, in a queue that is filled before the first of them and without synchronisation between rounds; what no
queue holds, such as a whole step, is timed by the profiler.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

CUDA = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]  the profiler's events have it


def device_seconds(run: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """Returns (the device's seconds of each round, the host's and the device's together of some).

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
    """Returns seconds of each round between events in a queue that the device starts on ``ahead`` seconds later.

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
    """Returns the seconds of each round in which the device was busy, by PyTorch's profiler; empty if it sees none."""
    found = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            run()
            torch.cuda.synchronize()
        on_device = [event for event in profiled.events() or () if event.device_type == CUDA]
        found.append(covered([(event.time_range.start, event.time_range.end) for event in on_device]) / 1e6)
    return found if all(found) else []


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of ``spans``, each from start to end."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def write_down(benchmark, seconds: list[float]) -> None:
    """Gives ``benchmark`` the ``seconds``, which were measured before, as its rounds."""
    times = itertools.accumulate(itertools.chain(*([0.0, each] for each in seconds)))
    benchmark._timer = lambda: next(times)  # the fixture reads it before and after each round
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
