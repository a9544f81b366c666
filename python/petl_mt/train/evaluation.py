"""Evaluations between updates, and the checkpoints that follow them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..data import Corpus
from ..evaluate import BatchLimit, until_it_fits, validation_loss
from .setup import Setup


def evaluate_and_save(run: Setup) -> None:
    """Computes the validation loss where there is such text, and saves a checkpoint; without text, each is the best."""
    run.step_log.settle()
    run.update.release()
    progress, best = run.progress, True
    valid = run.text.valid
    if valid is not None:
        with run.log.watching(f"step {progress.step}, validation loss", len(valid), "pairs") as watch:
            loss = within_budget(run, lambda limit: _validation_loss(run, valid, limit, watch.at))
        best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        if best:
            progress.best_loss, progress.evaluations_since_best = loss, 0
        else:
            progress.evaluations_since_best += 1
        run.log.metrics(progress.step, valid_loss=round(loss, 6))
        run.log.say(f"step {progress.step}: validation loss {loss:.4f}{' (best)' if best else ''}")
    if best:
        progress.best_step = progress.step
    save_checkpoint(run, best)


def save_checkpoint(run: Setup, best: bool) -> None:
    """Saves the run as it stands; best: as the best step so far, too."""
    run.step_log.settle()
    run.progress.loss_scale = run.update.loss_scale.state()
    run.checkpoints.save(run.model, run.optimizer, dataclasses.asdict(run.progress), best)


def within_budget(run: Setup, evaluate: Callable[[BatchLimit], Any]) -> Any:
    """Returns ``evaluate(limit of a batch)``; a limit that a budget is too small for is lowered for the whole run."""
    if run.plan is None:
        return evaluate(run.evaluation_limit.batch)
    assert run.config.memory is not None
    result, run.evaluation_limit.batch = until_it_fits(
        evaluate, run.evaluation_limit.batch, run.config.memory, run.log.say
    )
    return result


def _validation_loss(run: Setup, valid: Corpus, limit: BatchLimit, told: Callable[[int], None]) -> float:
    """Returns the loss over batches of at most a micro-batch's tokens, which take less than a training step."""
    graphs, most = run.update.graphs, min(limit.tokens, run.update.micro_tokens or limit.tokens)
    given = run.model, valid, most, run.text.start, run.accelerator.autocast, told, bool(run.progress.packed)
    try:
        return validation_loss(*given, graphs and graphs.loss)
    finally:
        run.update.release()
