"""The training loop: updates until the last step, with an evaluation and a checkpoint now and then."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..data import Position
from .evaluation import evaluate_and_save, save_checkpoint
from .interrupts import stop_requests
from .result import RunResult, write_result
from .saved_bytes import measure_saved_bytes
from .schedule import lr_factor
from .setup import Setup


def run_training(run: Setup) -> RunResult:
    """Trains to the end of the run, and writes its result. Raises KeyboardInterrupt where a signal has stopped it."""
    try:
        with stop_requests(partial(tell_interrupt, run)) as interrupted:
            train_to_the_end(run, interrupted)
        return _write_result(run)
    finally:
        run.log.close()


def finish_training(run: Setup) -> RunResult:
    """Writes the result of a run after the updates that it has done, evaluated where it was not yet."""
    step, config = run.progress.step, run.config
    try:
        if step % config.eval_every and step != config.steps:
            evaluate_and_save(run)
        return _write_result(run)
    finally:
        run.log.close()


def train_to_the_end(run: Setup, interrupted: Callable[[], bool]) -> None:
    """Makes updates until the last step, or until the patience with the validation loss ends.

    interrupted: returns whether a signal has come; the step is then saved, and KeyboardInterrupt is raised.
    """
    config, progress = run.config, run.progress
    run.model.train()
    if run.plan:
        run.update.try_worst_batch(run.tokenizer.eos_token_id, run.meter, bool(progress.packed))
    if progress.saved_bytes_per_token is None:
        measure_saved_bytes(run)
    while progress.step < config.steps and not _out_of_patience(run):
        train_one_update(run)
        if progress.step % config.eval_every == 0 or progress.step == config.steps:
            evaluate_and_save(run)
        elif interrupted():
            save_checkpoint(run, best=False)
        if interrupted():
            run.log.say(f"interrupted; step {progress.step} is saved, go on with --resume, or petl-mt finish")
            raise KeyboardInterrupt
    if progress.step < config.steps:
        run.log.say(
            f"stopped at step {progress.step} of {config.steps}: {progress.evaluations_since_best} evaluations "
            f"without a better loss (patience {config.patience})"
        )


def train_one_update(run: Setup) -> None:
    """Makes one update, with gradients of ``accumulate`` batches over all their target tokens together."""
    began = time.perf_counter()
    config, progress = run.config, run.progress
    position = Position(progress.epoch, progress.batch)
    batches = [run.batches.take(position) for _ in range(config.accumulate)]
    tokens = sum(batch.target_tokens for batch in batches)
    lr = config.lr * lr_factor(config.schedule, progress.step + 1, config.warmup, config.steps)
    loss = run.update.gradients(batches, tokens)
    norm = run.update.step(lr)
    padding = 1 - sum(run.batches.corpus.tokens(batch.indices) for batch in batches) / run.update.positions

    progress.step += 1
    progress.epoch, progress.batch = position.epoch, position.batch
    progress.target_tokens += tokens
    run.step_log.record(loss, norm, run.update.loss_scale, lr, padding, began)
    run.step_log.tell_turned_down()


def tell_interrupt(run: Setup, again: bool) -> None:
    """Prints what a signal does; again: it is the second one.

    A signal's handler calls this, perhaps while a print is under way, so that it writes to the descriptor itself.
    """
    latest, durations = run.checkpoints.path("latest"), run.step_log.durations
    safe = f"step {latest.name.removeprefix('step-')} is on disk" if latest else "no step is on disk yet"
    last = f" (the last one took {round(durations[-1], 2):g} s)" if durations else ""
    text = (
        f"interrupted again: stopped at once; {safe}, go on with --resume"
        if again
        else f"interrupted: stops after this update{last} or evaluation, and writes a checkpoint; once more to "
        f"stop at once: {safe}"
    )
    if not run.quiet:
        with suppress(OSError):  # Ctrl-C has ended the reader, too
            os.write(2, f"\n{text}\n".encode())


def _out_of_patience(run: Setup) -> bool:
    patience = run.config.patience
    return patience is not None and run.progress.evaluations_since_best >= patience


def _write_result(run: Setup) -> RunResult:
    try:
        return write_result(run)
    except KeyboardInterrupt:
        run.log.say(f"interrupted; step {run.progress.step} is saved, petl-mt finish {run.config.out} ends the run")
        raise
