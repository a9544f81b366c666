"""The settings and the checkpoint that a resumed run takes from its earlier part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from petl_kernels.errors import InputError

from ..config import TrainConfig
from ..runs.checkpoint import Checkpoints, read_progress


def with_settings_of(before: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Returns ``config`` with the settings of the run where it leaves them open and they followed from its steps."""
    names = ("warmup", "eval_every", "cuda_graphs", "precision")
    kept = {name: getattr(before, name) for name in names if getattr(config, name) is None}
    return dataclasses.replace(config, **kept)


def checkpoint_to_resume(
    checkpoints: Checkpoints, config: TrainConfig, before: TrainConfig
) -> tuple[Path | None, list[str]]:
    """Returns (the checkpoint to go on from, lines on damaged ones and on what differs from ``before``).

    Raises InputError where the run has done more steps than ``config`` has.
    """
    latest, notes = checkpoints.whole("latest")
    done, steps = (read_progress(latest)["step"] if latest else 0), config.steps
    if steps < done:
        raise InputError(f"steps {steps}: the run has done {done}; expected at least that, or petl-mt finish")
    if steps != before.steps:
        notes = [
            *notes,
            f"steps {before.steps} -> {steps}: from step {done + 1} on, learning rates are those of a run of "
            f"{steps} steps ({config.schedule}, warmup {config.warmup})",
        ]
    return latest, notes
