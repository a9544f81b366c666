"""Training: everything that happens between a configuration and a run folder."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path

from petl_kernels.errors import InputError

from ..checks import check_folder, check_one_process
from ..config import Pair, TrainConfig
from ..runs import RunFolder
from ..runs.checkpoint import Checkpoints, read_progress
from ..runs.folder import absolute
from ..runs.lock import locked
from ..silence import hush
from ..terminal import say
from .loop import finish_training, run_training
from .result import RunResult
from .setup import set_up
from .step_log import TrainingStopped

__all__ = ["RunResult", "TrainingStopped", "finish", "train"]


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> RunResult:
    """Trains as ``config`` says, into the folder ``config.out``.

    resume: goes on from the last checkpoint there, with the same data order and generators; ``steps`` may be another
    number than before, and the learning rates that are left are those of a run of so many. quiet: prints nothing.

    Nothing is written before every input has been read and found right. Raises InputError for what a user can mend, and
    TrainingStopped when the loss is no longer a number.
    """
    config.check()
    check_one_process()
    config = _with_absolute_paths(config)
    run = RunFolder(Path(config.out))
    resuming = resume and run.config.exists()
    if not resuming:
        run.check_free()
    check_folder("out", run.path)
    if resume and not resuming and not quiet:
        say(f"out {run.path}: no run to resume; a new one begins")
    with hush(), ExitStack() as limits:
        if resuming:
            limits.enter_context(locked(run.path))
        return run_training(set_up(config, run, resuming, quiet, limits))


def finish(folder: str | Path, quiet: bool = False) -> RunResult:
    """Ends the stopped run in ``folder`` where it stands: its last evaluation, its scores, its adapter or model.

    Raises InputError for a run that has finished, and for one without a checkpoint.
    """
    check_one_process()
    run = RunFolder(Path(absolute(str(folder))))
    config = dataclasses.replace(run.read_config(), out=str(run.path))
    check_folder("run", run.path)
    with hush(), ExitStack() as limits:
        limits.enter_context(locked(run.path))
        latest, _ = Checkpoints(run.checkpoints).whole("latest")
        if latest is None:
            raise InputError(f"run {run.path}: no checkpoint in it yet; expected train --resume")
        if run.finished_step() == read_progress(latest)["step"]:
            raise InputError(f"run {run.path}: has finished, at step {run.finished_step()}")
        return finish_training(set_up(config, run, True, quiet, limits))


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    def pairs(items: list[Pair]) -> list[Pair]:
        return [dataclasses.replace(p, source=absolute(p.source), target=absolute(p.target)) for p in items]

    model = absolute(config.model) if not config.is_new and os.path.isdir(config.model) else config.model
    return dataclasses.replace(
        config,
        model=model,
        out=absolute(config.out),
        train=pairs(config.train),
        valid=pairs(config.valid),
        vocab_text=[absolute(path) for path in config.vocab_text],
        plan=None if config.plan is None else absolute(config.plan),
    )
