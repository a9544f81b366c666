"""Training: everything that happens between a configuration and a run folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.device import resolve
from petl_kernels.dispatch import turned_down
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir, atomic_write
from petl_kernels.interop.adapters import write_merged
from petl_kernels.layers.loss.lean_loss import packing_obstacle
from petl_kernels.planning.beam_search import output_length
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan
from petl_kernels.planning.resident import OPTIMIZER_BYTES
from petl_kernels.step import cap
from petl_kernels.step.graphs import check_device
from petl_kernels.units import format_size, parse_size

from .apart import ONE_SIGNAL
from .checkpoint import Checkpoints, read_progress
from .checks import (
    check_files,
    check_folder,
    check_one_process,
    check_same_text,
    check_space,
    little_effect,
    names_of,
    text_sums,
    write_text_sums,
)
from .config import UNCAPTURED, Pair, TrainConfig
from .data import Batch, PackedBatch, Position, TrainBatches, encode_pairs, read_pair
from .evaluate import BatchLimit, Scores, bleu_metric, score_lines, translate, until_it_fits, validation_loss
from .late import LateReader
from .lock import locked
from .log import RunLog
from .memory import MemoryMeter, process_bytes
from .plan import captures, plan_for, prepared, widened, width_multiple
from .prepare import (
    check_beam,
    check_positions,
    decoder_start,
    language_pair,
    load_model,
    make_accelerator,
    make_optimizer,
)
from .progress import Watch, say
from .runs import RunFolder, absolute, folder_for_layers, hush
from .schedule import lr_factor
from .update import Update

LOG_LINES = 200  # lines of training metrics over a whole run


class TrainingStopped(InputError):
    """The run cannot go on (the loss is no number any more); the last good checkpoint is kept."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside tensors."""

    step: int = 0  # updates done
    epoch: int = 0
    batch: int = 0  # of this epoch, the next one
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    target_tokens: int = 0
    seconds: float = 0.0  # in training steps
    saved_bytes_per_token: float | None = None
    plain_saved_bytes_per_token: float | None = None
    packed: bool | None = None  # whether batches are packed rows; decided once, when the run begins


@dataclass
class RunResult:
    """What a run came to; result.json holds the same."""

    out: str
    method: str
    steps: int
    best_step: int
    valid_loss: float | None
    scores: dict[str, Scores]  # by pair, on the validation text
    trained_parameters: int  # that the optimiser has
    stored_parameters: int  # of the adapter or model that is written; fewer where training uses another form
    total_parameters: int  # of the model without what was added to it
    seconds_per_step: float
    target_tokens_per_second: float
    saved_bytes_per_token: float | None  # kept for backward, per token of source and target, padding too
    plain_saved_bytes_per_token: float | None  # what it would be with the model's own layers and loss
    peak_memory_bytes: int | None  # of what a budget counts; None where nothing counts it
    peak_process_bytes: int  # host memory of the process: Python and its libraries too
    data: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list, repr=False)

    @property
    def trained_share(self) -> float:
        """What the method adds to or changes in the model, over the model's parameters."""
        return self.stored_parameters / self.total_parameters

    @property
    def bleu(self) -> float | None:
        """BLEU of the first validation pair."""
        return next((scores.bleu for scores in self.scores.values()), None)

    @property
    def chrf(self) -> float | None:
        return next((scores.chrf for scores in self.scores.values()), None)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["losses"]
        return {**values, "trained_share": self.trained_share}


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> RunResult:
    """Train as ``config`` says, into the folder ``config.out``.

    ``resume`` goes on from the last checkpoint there, with the same data order and generators; ``steps`` may be others
    than before, and the learning rates that are left are those of a run of so many. Nothing is written before every
    input has been read and found right. Raises InputError for what a user can mend, TrainingStopped when the loss is no
    longer a number.
    """
    config.check()
    check_one_process()
    config = _absolute_paths(config)
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
        return _Training(config, run, resuming, quiet, limits).run()


def finish(folder: str | Path, quiet: bool = False) -> RunResult:
    """End the stopped run in ``folder`` where it stands: its last evaluation, scores, and what a user takes away.

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
        return _Training(config, run, True, quiet, limits).finish()


class _Training:
    def __init__(
        self, config: TrainConfig, run: RunFolder, resuming: bool, quiet: bool, limits: ExitStack | None = None
    ) -> None:
        self.folder, self.quiet, self.limits = run, quiet, limits
        if config.plan is not None:
            Plan.load(config.plan)  # refused now, not after the text has been read
        self.to_say = check_files(config)
        self.text_sums = text_sums(config)
        if resuming:
            check_same_text(run.text, self.text_sums)
        with Watch("reading text", 2 * len([*config.train, *config.valid]), "files", quiet) as reading:
            text = []
            for pair in [*config.train, *config.valid]:
                text.append((pair, *read_pair(pair)))
                reading.at(2 * len(text))
        train_text, self.valid_text = text[: len(config.train)], text[len(config.train) :]
        for pair in config.valid:
            bleu_metric(pair.tgt_lang, config.bleu_tokenize)  # refused now, not after hours of training
        if config.memory is not None:
            cap.expand_segments()
        self.accelerator = make_accelerator(config.precision)
        self.device = resolve(self.accelerator.device)
        before = run.read_config() if resuming else None
        if before is not None:  # what followed from the number of steps then still holds
            names = ("warmup", "eval_every", "cuda_graphs")
            kept = {name: getattr(before, name) for name in names if getattr(config, name) is None}
            config = dataclasses.replace(config, **kept)
        if config.cuda_graphs:
            check_device(self.device)
        torch.manual_seed(config.seed)

        self.meter = MemoryMeter(self.device)  # before weights are read
        self.model, self.tokenizer = load_model(config, run, train_text, resuming, quiet)
        check_positions(self.model, config.max_length)
        self.config = config = config.resolve(self.model.config.d_model)
        if before is not None:
            run.check_same(config)
        check_beam(config.beam, self.model)
        self.to_say += little_effect(config)
        pairs = {pair.name: pair for pair in [*config.train, *config.valid]}
        self.languages = {name: language_pair(self.model, self.tokenizer, pair) for name, pair in pairs.items()}
        self.start = decoder_start(self.model, next(iter(self.languages.values())))
        with Watch("tokenising", sum(len(source) for _, source, _ in train_text), "lines", quiet) as encoding:
            given = train_text, self.languages, config.max_length, "train", encoding.at
            corpus, self.counts = encode_pairs(*given)
        self.valid, self.valid_counts = None, []
        if config.valid:
            self.valid, self.valid_counts = encode_pairs(self.valid_text, self.languages, config.max_length, "valid")
            for count, name in zip(self.valid_counts, names_of(config.valid), strict=True):
                count.name = f"valid {name}"
        self.multiple = width_multiple(self.device)
        self.batches = TrainBatches(corpus, config.batch_tokens, config.seed, self.multiple)

        self.total_parameters = self.stored_parameters = sum(p.numel() for p in self.model.parameters())
        longest = widened(int(corpus.lengths.max()), self.device)
        like = self._like() if config.memory is not None else None
        self.plan = self._make_plan(like, longest) if like is not None else None
        if limits is not None and config.memory is not None:
            limits.enter_context(cap.capped(parse_size(config.memory), self.device))
            self.meter = MemoryMeter(self.device)  # what a budget counts begins here
        self._load(config, like)
        self.meter.watch(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if config.method != "full":
            self.stored_parameters = pk.report(self.model).stored
        optimizer = self.plan.optimizer if self.plan else config.optimizer
        self.optimizer = self.accelerator.prepare(make_optimizer(self.parameters, config, optimizer))
        self.limit = BatchLimit(config.batch_tokens)
        if self.plan:
            self.limit = BatchLimit(self.plan.evaluation_tokens, self.plan.search)

        self._check_space(optimizer)
        self.progress = Progress()
        self.checkpoints = Checkpoints(run.checkpoints)
        self.durations: list[float] = []
        self.losses: list[float] = []
        self.told = 0  # of what has been turned down
        self._prepare_folder(before)
        self._choose_rows()
        pad = self.tokenizer.pad_token_id
        given = (self.model, self.optimizer, self.accelerator, config, self.plan, self.start, pad, self.log.say)
        self.update = Update(*given, longest=self._longest_row() if self._captures() else None)
        self.numbers = LateReader(self.device, self._log_step)

    def _load(self, config: TrainConfig, like: nn.Module | None) -> None:
        """Weights, what the method adds, tiers; in the storage and the place of the plan."""
        with folder_for_layers(self.plan, self.folder.path) as folder:
            if self.plan and not config.is_new:
                self.model = load_planned(config.model, self.model, like, self.plan, folder)
            torch.manual_seed(config.seed)  # what is injected starts the same, whatever was made before it
            self.model = prepared(self.model, config)
            if self.plan:
                files = sorted(folder.glob("*.safetensors")) if folder else []
                self.plan.apply(self.model, folder, files)
            else:
                pk.lean(self.model, 1 if config.tier is None else config.tier)
        self.model.to(self.device)

    def _like(self) -> nn.Module:
        """The model as it will be trained, on the meta device."""
        with torch.random.fork_rng():
            return prepared(copy.deepcopy(self.model).to("meta"), self.config)

    def _make_plan(self, model: nn.Module, longest: int) -> Plan:
        """The plan under ``--memory``: the given one, or the fastest for this model and its longest sentence."""
        given, own = self.config.plan, self.folder.plan
        if given is None and own.exists() and torch.device(Plan.load(own).device).type == self.device.type:
            given = own  # resumed: the same storage and optimiser, whatever the rates are today
        if given is None:
            return plan_for(model, self.config, longest, self.device)
        plan = Plan.load(given)
        plan.check(model)
        if plan.memory != (memory := parse_size(self.config.memory)):
            raise InputError(
                f"plan {given}: for {format_size(plan.memory)}; expected one for the {format_size(memory)} of --memory"
            )
        if torch.device(plan.device).type != self.device.type:
            raise InputError(f"plan {given}: for {plan.device}; expected one for {self.device.type}")
        if self.config.cuda_graphs and not plan.cuda_graphs and given != own:  # its own may have been tightened
            raise InputError(
                f"plan {given}: has no room for CUDA graphs, or uses what they cannot hold; expected one made with "
                "--cuda-graphs, or a run without it"
            )
        if plan.precision != self.config.precision:
            raise InputError(
                f"plan {given}: for products in {plan.precision}; expected one for the {self.config.precision} of "
                "--precision"
            )
        if plan.batch_tokens != self.config.batch_tokens:
            raise InputError(
                f"plan {given}: for updates of {plan.batch_tokens} tokens; expected the {self.config.batch_tokens} of "
                "--batch-tokens"
            )
        forbidden = plan.forbidden(self.config.allow, self.config.optimizer)
        if forbidden:
            raise InputError(f"plan {given}: uses {forbidden}; expected --allow {forbidden} beside it")
        if plan.longest < longest:
            raise InputError(f"plan {given}: for sentences of {plan.longest} tokens; the text has some of {longest}")
        return plan

    def _check_space(self, optimizer: str) -> None:
        """For the latest checkpoint, the best, one that is being written, and what is written at the end."""
        trained = sum(p.nbytes for p in self.parameters)
        state = sum(map(OPTIMIZER_BYTES[optimizer], self.parameters))
        need = 3 * (trained + state) + trained
        there = sum(path.stat().st_size for path in self.folder.checkpoints.glob("*/*") if not path.parent.is_symlink())
        check_space("out", self.folder.path, max(0, need - there), "checkpoints and the result")

    def _prepare_folder(self, before: TrainConfig | None) -> None:
        """before: the configuration that the run had when it is resumed."""
        latest = self._resume(before) if before is not None else None
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if before is None:
            if self.limits is not None:
                self.limits.enter_context(locked(self.folder.path))
                self.folder.check_free()  # once more: another process may have begun here meanwhile
            write_text_sums(self.folder.text, self.text_sums)
        if before != self.config:
            self.folder.write_config(self.config)
        if self.config.is_new and not self.folder.vocabulary.exists():
            with atomic_dir(self.folder.vocabulary) as temporary:
                self.tokenizer.save_pretrained(temporary)
        if latest is not None:
            self.progress = Progress(**self.checkpoints.load(latest, self.model, self.optimizer))
            self.progress.packed = bool(self.progress.packed)  # runs of earlier versions have padded batches
        self.log = RunLog(self.folder.path, self.config.steps, self.progress.step, self.config.tensorboard, self.quiet)
        for line in self.to_say:
            self.log.say(line)
        for count in [*self.counts, *self.valid_counts]:
            self.log.say(count.line())
        share = self.stored_parameters / self.total_parameters
        self.log.say(
            f"{self.config.method}: {self.stored_parameters:,} of {self.total_parameters:,} parameters "
            f"({share:.3%}), lr {self.config.lr:g}, {self.device}, "
            f"{self.config.precision}"
        )
        if self.plan:
            self.plan.save(self.folder.plan)
            for line in str(self.plan).splitlines():
                self.log.say(line)
            search, longest = self.plan.search, self.plan.longest
            if (
                self.config.valid
                and search
                and not search.rows(longest, output_length(longest, self.config.max_length))
            ):
                self.log.say(
                    f"the search with {self.config.beam} beams has no room for a sentence of {longest} tokens; where "
                    "validation text has one, the run ends without scores (a smaller --beam takes less)"
                )
        if self.progress.step:
            self.log.say(f"resumed after step {self.progress.step}")

    def _choose_rows(self) -> None:
        """Packed rows where the model reads them. A run that is resumed goes on as it began: its dropout depends on it.

        Raises InputError where it began packed, and the model reads no packed rows now.
        """
        reason, began = packing_obstacle(self.model), self.progress.packed
        if began and reason:
            raise InputError(f"out {self.folder.path}: the run began with packed rows, which cannot go on ({reason})")
        if began is None:
            self.progress.packed = not reason
        if not self.progress.packed and self.config.cuda_graphs:
            reason = reason or "the run began with padded ones"
            raise InputError(f"cuda_graphs: they take packed rows, and {reason}; expected a run without --cuda-graphs")
        if self.progress.packed:
            self.batches.start = self.start
            self.log.say("batches are packed rows, without padding")
        else:
            self.log.say(f"batches are padded: {reason or 'the run began so'}")

    def _captures(self) -> bool:
        """Whether steps are captured as CUDA graphs; says so on a CUDA device, and why not."""
        config, reason = self.config, ""
        if config.cuda_graphs is False:
            reason = "cuda_graphs is false"
        elif config.tier in UNCAPTURED:
            reason = UNCAPTURED[config.tier]
        elif not self.progress.packed:
            reason = "they take packed rows"
        elif self.plan is not None and not self.plan.cuda_graphs:
            reason = "the plan is one without: they have no room, or it is faster by what they cannot hold"
        if captures(config, self.device) and not reason:
            self.log.say("steps are captured as CUDA graphs, one for each shape of rows")
            return True
        if self.device.type == "cuda" or config.cuda_graphs:
            self.log.say(f"steps run without CUDA graphs: {reason}")
        return False

    def _longest_row(self) -> int:
        """Returns the tokens of the longest sentence of training and validation text, and of the plan's worst batch."""
        found = [int(text.lengths.max()) for text in (self.batches.corpus, self.valid) if text is not None]
        return max(found + [self.plan.longest] if self.plan else found)

    def _resume(self, before: TrainConfig) -> Path | None:
        """The checkpoint to go on from; notes what differs from ``before``."""
        latest, damaged = self.checkpoints.whole("latest")
        self.to_say += damaged
        done, steps = (read_progress(latest)["step"] if latest else 0), self.config.steps
        if steps < done:
            raise InputError(f"steps {steps}: the run has done {done}; expected at least that, or petl-mt finish")
        if steps != before.steps:
            self.to_say.append(
                f"steps {before.steps} -> {steps}: from step {done + 1} on, learning rates are those of a run of "
                f"{steps} steps ({self.config.schedule}, warmup {self.config.warmup})"
            )
        return latest

    def run(self) -> RunResult:
        try:
            with _interrupts(self._tell_interrupt) as interrupted:
                self._loop(interrupted)
            return self._finish_or_tell()
        finally:
            self.log.close()

    def finish(self) -> RunResult:
        """End the run after the updates that it has done."""
        evaluated = self.progress.step % self.config.eval_every == 0 or self.progress.step == self.config.steps
        try:
            if not evaluated:
                self._evaluate_and_save()
            return self._finish_or_tell()
        finally:
            self.log.close()

    def _finish_or_tell(self) -> RunResult:
        try:
            return self._finish()
        except KeyboardInterrupt:
            self.log.say(
                f"interrupted; step {self.progress.step} is saved, petl-mt finish {self.config.out} ends the run"
            )
            raise

    def _tell_interrupt(self, again: bool) -> None:
        """From inside a signal's handler, where a print may be under way: to the file itself."""
        latest = self.checkpoints.path("latest")
        safe = f"step {latest.name.removeprefix('step-')} is on disk" if latest else "no step is on disk yet"
        last = f" (the last one took {round(self.durations[-1], 2):g} s)" if self.durations else ""
        text = (
            f"interrupted again: stopped at once; {safe}, go on with --resume"
            if again
            else f"interrupted: stops after this update{last} or evaluation, and writes a checkpoint; once more to "
            f"stop at once: {safe}"
        )
        if not self.quiet:
            with suppress(OSError):  # Ctrl-C has ended the reader, too
                os.write(2, f"\n{text}\n".encode())

    def _loop(self, interrupted: Callable[[], bool]) -> None:
        config, progress = self.config, self.progress
        self.model.train()
        if self.plan:
            self.update.try_worst_batch(self.tokenizer.eos_token_id, self.meter, self.progress.packed)
        if progress.saved_bytes_per_token is None:
            self._measure_saved()
        while progress.step < config.steps and not self._out_of_patience():
            self._update()
            if progress.step % config.eval_every == 0 or progress.step == config.steps:
                self._evaluate_and_save()
            elif interrupted():
                self._save(best=False)
            if interrupted():
                self.log.say(f"interrupted; step {progress.step} is saved, go on with --resume, or petl-mt finish")
                raise KeyboardInterrupt
        if progress.step < config.steps:
            self.log.say(
                f"stopped at step {progress.step} of {config.steps}: {progress.evaluations_since_best} evaluations "
                f"without a better loss (patience {config.patience})"
            )

    def _measure_saved(self) -> None:
        """What a forward pass keeps of each token, and what it would keep with the model's own layers."""
        plan = self.update.plan  # tightened, maybe
        rows = min(4, plan.rows) if plan else 4
        indices = self.batches.plan(self.progress.epoch)[self.progress.batch][:rows]
        own = list(plan.tiers) if plan else 1 if self.config.tier is None else self.config.tier
        plain = self._saved_bytes_per_token(0, self.batches.of(indices, padded=True).to(self.device))
        kept = self._saved_bytes_per_token(own, self.batches.of(indices).to(self.device))
        self.progress.plain_saved_bytes_per_token, self.progress.saved_bytes_per_token = plain, kept
        if own and kept is not None:
            theirs = "do not fit" if plain is None else f"would keep {plain:,.0f}"
            self.log.say(
                f"{kept:,.0f} bytes a token are kept for the backward pass; the model's own layers and loss {theirs}"
            )

    def _saved_bytes_per_token(self, tiers: int | list[int], part: Batch | PackedBatch) -> float | None:
        """None where a budget of memory has no room for it."""
        pk.lean(self.model, tiers)
        given = part.row.values() if isinstance(part, PackedBatch) else (part.source, part.labels)
        living = [*self.model.parameters(), *self.model.buffers(), *(x for x in given if isinstance(x, torch.Tensor))]
        try:
            with torch.random.fork_rng(), saved_bytes(exclude=living) as saved:
                self.update.loss(part, 1)
        except torch.OutOfMemoryError:
            return None
        return saved.bytes / (part.source.numel() + part.labels.numel())

    def _update(self) -> None:
        """One update: gradients of ``accumulate`` batches, normalised by all their target tokens together."""
        began = time.perf_counter()
        config, progress = self.config, self.progress
        position = Position(progress.epoch, progress.batch)
        batches = [self.batches.take(position) for _ in range(config.accumulate)]
        tokens = sum(batch.target_tokens for batch in batches)
        lr = config.lr * lr_factor(config.schedule, progress.step + 1, config.warmup, config.steps)
        loss = self.update.gradients(batches, tokens)
        norm = self.update.step(lr)
        padding = 1 - sum(self.batches.corpus.tokens(batch.indices) for batch in batches) / self.update.positions

        progress.step += 1
        progress.epoch, progress.batch = position.epoch, position.batch
        progress.target_tokens += tokens
        before = progress.seconds
        progress.seconds = before + time.perf_counter() - began
        self.numbers.put(torch.stack([loss.float(), norm.float()]), dataclasses.replace(progress), lr, padding)
        seconds = time.perf_counter() - began
        progress.seconds = before + seconds
        self.durations.append(seconds)
        self._tell_turned_down()

    def _tell_turned_down(self) -> None:
        """A line for each backend that has been found wrong on this card, once: what serves instead may be slow."""
        for backend in turned_down()[self.told :]:
            self.told += 1
            self.log.say(str(backend))
            self.log.metrics(self.progress.step, turned_down=str(backend))

    def _log_step(self, progress: Progress, lr: float, padding: float, numbers: list[float]) -> None:
        """``progress`` as it was after the update whose loss and norm these are; padding: a share of its positions."""
        loss, norm = numbers
        self._check_finite(loss, norm, progress.step)
        self.losses.append(loss)
        every = max(1, self.config.steps // LOG_LINES)
        if progress.step % every and progress.step not in (1, self.config.steps):
            return
        recent = self.losses[-every:]
        speed = progress.target_tokens / progress.seconds
        self.log.metrics(
            progress.step,
            loss=round(sum(recent) / len(recent), 6),
            grad_norm=round(norm, 6),
            lr=lr,
            target_tokens=progress.target_tokens,
            target_tokens_per_second=round(speed, 1),
            epoch=progress.epoch,
            padding=round(padding, 4),
            memory_bytes=self.meter.memory(),
            process_bytes=process_bytes(),
            seconds=round(progress.seconds, 3),
        )
        self.log.progress(progress.step, sum(recent) / len(recent), speed, self.meter.text())

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        kept = self.checkpoints.path("latest")
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        raise TrainingStopped(f"training stopped at step {step}: {what} (lr {self.config.lr:g}); {where}")

    def _settle(self) -> None:
        """Wait for the last update: a loss that is no number stops the run before anything is kept of it."""
        began = time.perf_counter()
        self.numbers.settle()
        waited = time.perf_counter() - began
        self.progress.seconds += waited
        if self.durations:
            self.durations[-1] += waited

    def _evaluate_and_save(self) -> None:
        self._settle()
        self.update.release()
        progress = self.progress
        best = True
        if self.valid is not None:
            with self.log.watching(f"step {progress.step}, validation loss", len(self.valid), "pairs") as watch:
                loss = self._evaluated(lambda limit: self._validation_loss(limit, watch.at))
            best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
            if best:
                progress.best_loss, progress.evaluations_since_best = loss, 0
            else:
                progress.evaluations_since_best += 1
            self.log.metrics(progress.step, valid_loss=round(loss, 6))
            self.log.say(f"step {progress.step}: validation loss {loss:.4f}{' (best)' if best else ''}")
        if best:
            progress.best_step = progress.step
        self._save(best)

    def _validation_loss(self, limit: BatchLimit, told: Callable[[int], None]) -> float:
        """Returns the loss over batches of at most a micro-batch's tokens: they take less than a training step."""
        graphs, most = self.update.graphs, min(limit.tokens, self.update.micro_tokens or limit.tokens)
        given = self.model, self.valid, most, self.start, self.accelerator.autocast, told, self.progress.packed
        try:
            return validation_loss(*given, graphs and graphs.loss)
        finally:
            self.update.release()

    def _save(self, best: bool) -> None:
        self._settle()
        self.checkpoints.save(self.model, self.optimizer, dataclasses.asdict(self.progress), best)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _finish(self) -> RunResult:
        """Back to the best checkpoint; translate and score the validation text; write what a user takes away."""
        from .card import write_card

        config, progress = self.config, self.progress
        self.update.drop_graphs()
        best, damaged = self.checkpoints.whole("best")
        for line in damaged:
            self.log.say(line)
        if best is not None:
            self.checkpoints.load_trained(best, self.model)
        self.model.eval()
        self._write_weights()
        scores = self._scores_or_why_not()
        self._tell_turned_down()
        trained = sum(p.numel() for p in self.parameters)
        steady = self.durations[min(5, len(self.durations) // 2) :] or [progress.seconds / max(1, progress.step)]
        result = RunResult(
            out=config.out,
            method=config.method,
            steps=progress.step,
            best_step=progress.best_step,
            valid_loss=progress.best_loss,
            scores=scores,
            trained_parameters=trained,
            stored_parameters=self.stored_parameters,
            total_parameters=self.total_parameters,
            seconds_per_step=statistics.median(steady),
            target_tokens_per_second=progress.target_tokens / progress.seconds if progress.seconds else 0.0,
            saved_bytes_per_token=progress.saved_bytes_per_token,
            plain_saved_bytes_per_token=progress.plain_saved_bytes_per_token,
            peak_memory_bytes=self.meter.memory(),
            peak_process_bytes=process_bytes(),
            data=[dataclasses.asdict(count) for count in [*self.counts, *self.valid_counts]],
            losses=self.losses,
        )
        with atomic_write(self.folder.path / "result.json") as file:
            json.dump(result.to_dict(), file, indent=1, ensure_ascii=False)
            file.write("\n")
        write_card(self.folder, config, result)
        self.log.say(f"written: {config.out}")
        return result

    def _evaluated(self, run: Callable[[BatchLimit], Any]) -> Any:
        """``run(limit of a batch)``, with a lower one where a budget is too small."""
        if self.plan is None:
            return run(self.limit)
        result, self.limit = until_it_fits(run, self.limit, self.config.memory, self.log.say)
        return result

    def _write_weights(self) -> None:
        if self.config.method == "full":
            write_merged(self.model, self.tokenizer, self.folder.model)
            return
        pk.save_adapter(self.model, self.folder.adapter)

    def _scores_or_why_not(self) -> dict[str, Scores]:
        """The weights are written: what the scores lack is no reason to lose the end of the run."""
        try:
            return self._score()
        except InputError as error:
            self.log.say(f"the run ends without scores: {error}")
            return {}

    def _score(self) -> dict[str, Scores]:
        """Beam search on the validation text; hypotheses in valid.best.hyp, or valid.best.<pair>.hyp for several."""
        scores = {}
        for name, (pair, source, target) in zip(names_of(self.config.valid), self.valid_text, strict=True):
            with self.log.searching(f"search {name}", len(source)) as searching:
                lines, cut = self._evaluated(
                    lambda limit, source=source, language=self.languages[pair.name], told=searching.at: translate(
                        self.model,
                        language,
                        source,
                        self.config.beam,
                        self.config.max_length,
                        limit,
                        self.accelerator.autocast,
                        told,
                    )
                )
            if cut:
                self.log.say(f"{name}: {cut} validation sources cut to {self.config.max_length} tokens")
            scores[name] = result = score_lines(lines, target, pair.tgt_lang, self.config.bleu_tokenize)
            for line in result.lines():
                self.log.say(f"{name}: {line}")
            self.log.metrics(self.progress.step, pair=name, bleu=result.bleu, chrf=result.chrf)
            hypotheses = "valid.best.hyp" if len(self.valid_text) == 1 else f"valid.best.{name}.hyp"
            with atomic_write(self.folder.path / hypotheses) as file:
                file.write("".join(line + "\n" for line in lines))
        return scores


def _absolute_paths(config: TrainConfig) -> TrainConfig:
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


@contextmanager
def _interrupts(tell: Callable[[bool], None]):
    """Turn the first SIGINT or SIGTERM into a question the loop asks after each update; the second ends at once.

    tell(again): says what happens now. Signals within a second of each other are one: who stops a whole group of
    processes, as terminals and schedulers do, and the process that passes its own on, send several.
    """
    caught: list[float] = []  # when
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame) -> None:
        now = time.monotonic()
        if caught and now - caught[-1] < ONE_SIGNAL:
            return
        tell(bool(caught))
        if caught:
            raise KeyboardInterrupt
        caught.append(now)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
