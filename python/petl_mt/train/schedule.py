"""Learning-rate schedules as functions of the step alone, so that resuming needs no state of theirs."""

from __future__ import annotations


def lr_factor(schedule: str, step: int, warmup: int, steps: int, power: float = 2.0) -> float:
    """Returns the share of the peak rate at update ``step`` (the first is 1) of ``steps``.

    All rise linearly over ``warmup`` updates. Then, with p = (step - warmup) / (steps - warmup):
    inverse-sqrt falls as sqrt(warmup / step) (Vaswani et al. 2017), linear as 1 - p, polynomial as (1 - p)^power.
    """
    if step < warmup:
        return step / warmup
    if schedule == "inverse-sqrt":
        return (max(warmup, 1) / step) ** 0.5
    # The last update still moves: the rate reaches zero one update after the end.
    left = max(0.0, 1.0 - (step - warmup) / (steps + 1 - warmup)) if steps >= warmup else 1.0
    return left if schedule == "linear" else left**power
