"""The weights of a run: those of its end, or of the best checkpoint of one that has not finished."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_skeleton, load_weights
from petl_kernels.interop.plain import write_merged

from ..config import TrainConfig
from ..models.adapt import adapt
from ..models.new_model import load_vocabulary, make_model
from ..runs import RunFolder
from ..runs.checkpoint import Checkpoints, read_progress, while_it_trains
from ..terminal import say


@contextmanager
def trained_weights(run: RunFolder, config: TrainConfig) -> Iterator[Path]:
    """Yields the run's adapter/ or model/; for an unfinished run a temporary one, made from its best checkpoint.

    A line on standard error tells which checkpoint is used where it is not the end of the run. Raises InputError where
    there is none.
    """
    checkpoints = Checkpoints(run.checkpoints)
    if run.model.is_dir() or run.adapter.is_dir():
        latest = checkpoints.path("latest")
        ended, done = run.finished_step(), latest and latest.name.removeprefix("step-")
        if ended is not None and done is not None and str(ended) != done:
            say(f"run {run.path}: its end at step {ended} is used; it is at step {done} since then (petl-mt finish)")
        yield run.model if run.model.is_dir() else run.adapter
        return
    with tempfile.TemporaryDirectory(prefix="petl-mt-") as folder:
        progress, lines, weights = while_it_trains(lambda: _best_so_far(run, config, Path(folder)), checkpoints.there)
        best = "the best so far" if progress["best_step"] == progress["step"] else "the newest"
        for line in lines:
            say(line)
        say(
            f"run {run.path}: has not finished; step {progress['step']} of {config.steps}, {best}, is used "
            "(petl-mt finish ends the run)"
        )
        yield weights


def _best_so_far(run: RunFolder, config: TrainConfig, folder: Path) -> tuple[dict, list[str], Path]:
    """Returns (progress, lines on damaged checkpoints, weights in ``folder``) of the best checkpoint so far."""
    checkpoint, damaged = Checkpoints(run.checkpoints).whole("best")
    if checkpoint is None:
        raise InputError(f"run {run.path}: has not finished, and has no checkpoint yet; expected train --resume")
    return read_progress(checkpoint), damaged, _write_weights(run, config, checkpoint, folder)


def _write_weights(run: RunFolder, config: TrainConfig, checkpoint: Path, folder: Path) -> Path:
    """Writes the adapter or the model of ``checkpoint`` into ``folder``; loads no frozen weights beside an adapter."""
    if config.is_new:
        tokenizer = load_vocabulary(run.vocabulary)
        with torch.device("meta"):
            model = make_model(config, tokenizer)
    else:
        model, tokenizer = cast("tuple[Any, Any]", load_skeleton(config.model))
    full, checkpoints = config.method == "full", Checkpoints(run.checkpoints)
    model = adapt(model if full else model.to("meta"), config)
    if not full:
        _allocate_trained(model)
        checkpoints.load_trained(checkpoint, model)
        pk.save_adapter(model, folder / run.adapter.name)
        return folder / run.adapter.name
    saved = checkpoints.read_trained(checkpoint, model)
    if config.is_new:
        _allocate_trained(model, saved)
    else:
        load_weights(config.model, model, saved.get)
    return write_merged(model, tokenizer, folder / run.model.name)


def _allocate_trained(model, values: Mapping[str, torch.Tensor] | None = None) -> None:
    """Replaces the trained parameters of a model on the meta device by ``values`` by name, or by zeros."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.requires_grad:
            if id(parameter) not in made:
                value = torch.zeros_like(parameter, device="cpu") if values is None else values[name]
                made[id(parameter)] = torch.nn.Parameter(value)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, made[id(parameter)])
