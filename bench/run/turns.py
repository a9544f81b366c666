"""Steps of several implementations in turn: all meet the same moments of a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_in_turn(
    steps: Mapping[Any, Callable[[], None]], rounds: int, warm: int, device: str
) -> dict[Any, list[float]]:
    """Returns each step's seconds in ``rounds`` rounds, in which each has one turn, after ``warm`` others.

    On a GPU the time is that until the host has queued the step.
    """
    found = {name: [] for name in steps}
    for k in range(warm + rounds):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if k >= warm:
                found[name].append(time.perf_counter() - began)
    return found


def ratio(seconds: list[float], others: list[float]) -> float:
    """Returns the median over the rounds of one time over another of the same round."""
    return statistics.median(one / two for one, two in zip(seconds, others, strict=True))
