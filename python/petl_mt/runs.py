"""A run folder: what lies where, and loading what was trained."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write

from . import lock
from .checkpoint import Checkpoints, read_progress, while_it_trains
from .checks import check_one_process
from .config import TrainConfig, check_count, load_yaml
from .evaluate import BatchLimit, fitting_length, translate, until_it_fits
from .progress import say


@dataclass(frozen=True)
class RunFolder:
    """config.yaml, text.json, metrics.jsonl, checkpoints/, and of one that has finished result.json, README.md,
    valid.best.hyp, and adapter/ or model/."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def vocabulary(self) -> Path:  # of a new model
        return self.path / "vocab"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def plan(self) -> Path:  # of a run with a memory budget
        return self.path / "plan.json"

    @property
    def text(self) -> Path:  # sizes and checksums of the files that the run reads
        return self.path / "text.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def finished_step(self) -> int | None:
        """The step at which the run has ended, with what is taken away from it; None where it has not."""
        if not (self.adapter.is_dir() or self.model.is_dir()):
            return None
        try:
            return int(json.loads((self.path / "result.json").read_text(encoding="utf-8"))["steps"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def check_free(self) -> None:
        """Refuse a folder that holds anything, another run above all."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out {self.path}: is a file; expected a folder for the run")
        if self.config.exists():
            raise InputError(f"out {self.path}: holds another run; expected an empty folder, or --resume")
        own = (lock.NAME, self.text.name)  # of a run that was killed before it had its config.yaml
        if self.path.is_dir() and any(path.name not in own for path in self.path.iterdir()):
            raise InputError(f"out {self.path}: is not empty; expected an empty folder")

    def check_same(self, config: TrainConfig) -> None:
        """Refuse to resume under another configuration, naming the keys that differ.

        When to end may be changed, and whether steps are captured as CUDA graphs, which changes dropout's masks.
        """
        old, new = self.read_config().to_dict(), config.to_dict()
        for values in (old, new):  # earlier versions wrote a plan's path as it was given
            values["plan"] = values["plan"] and absolute(values["plan"])
        differing = [
            key for key in new if key not in ("out", "steps", "patience", "cuda_graphs") and old[key] != new[key]
        ]
        if differing:
            shown = ", ".join(f"{key} ({_short(old[key])} -> {_short(new[key])})" for key in differing)
            raise InputError(f"out {self.path}: cannot resume with another configuration: {shown}")

    def read_config(self) -> TrainConfig:
        if not self.config.exists():
            raise InputError(f"run {self.path}: no config.yaml in it; expected the --out folder of petl-mt train")
        return TrainConfig.from_dict(load_yaml(self.config), str(self.config))

    def write_config(self, config: TrainConfig) -> None:
        with atomic_write(self.config) as file:
            yaml.safe_dump(config.to_dict(), file, sort_keys=False, allow_unicode=True)


def load_run(path: str | Path | TrainConfig):
    """(model, tokenizer, config) of a run, the best of it, ready to translate; of a configuration its model as it is
    before training."""
    import petl_kernels as pk
    from petl_kernels.interop.hf import load_pretrained

    if isinstance(path, TrainConfig):
        return *load_pretrained(path.model), path
    run = RunFolder(Path(path))
    config = run.read_config()
    with trained_weights(run, config) as weights:
        if weights.name == run.model.name:
            return *load_pretrained(weights), config
        model, tokenizer = load_pretrained(config.model)
        return pk.load_adapter(model, weights).eval(), tokenizer, config


@contextlib.contextmanager
def trained_weights(run: RunFolder, config: TrainConfig) -> Iterator[Path]:
    """The run's adapter/ or model/; of one that has not finished a temporary one, from the best checkpoint so far.

    A line on stderr says which it is where it is not the end of the run. InputError where there is none.
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
    """(progress, lines on damaged ones, weights in ``folder``) of the best checkpoint so far."""
    checkpoint, damaged = Checkpoints(run.checkpoints).whole("best")
    if checkpoint is None:
        raise InputError(f"run {run.path}: has not finished, and has no checkpoint yet; expected train --resume")
    return read_progress(checkpoint), damaged, _write_weights(run, config, checkpoint, folder)


def _write_weights(run: RunFolder, config: TrainConfig, checkpoint: Path, folder: Path) -> Path:
    """What the run would have written at ``checkpoint``, into ``folder``; no weights of the model are loaded for it."""
    import petl_kernels as pk
    from petl_kernels.interop.adapters import write_merged
    from petl_kernels.interop.hf import load_skeleton, load_weights

    from .new_model import load_vocabulary, make_model
    from .prepare import adapt

    if config.is_new:
        tokenizer = load_vocabulary(run.vocabulary)
        with torch.device("meta"):
            model = make_model(config, tokenizer)
    else:
        model, tokenizer = load_skeleton(config.model)
    full, checkpoints = config.method == "full", Checkpoints(run.checkpoints)
    model = adapt(model if full else model.to("meta"), config)
    if not full:
        _make_trained(model)
        checkpoints.load_trained(checkpoint, model)
        pk.save_adapter(model, folder / run.adapter.name)
        return folder / run.adapter.name
    saved = checkpoints.read_trained(checkpoint, model)
    if config.is_new:
        _make_trained(model, saved)
    else:
        load_weights(config.model, model, saved.get)
    return write_merged(model, tokenizer, folder / run.model.name)


def _make_trained(model, values: Mapping[str, torch.Tensor] | None = None) -> None:
    """Give the trained parameters of a model on the meta device memory, or ``values`` by name."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.requires_grad:
            if id(parameter) not in made:
                value = torch.zeros_like(parameter, device="cpu") if values is None else values[name]
                made[id(parameter)] = torch.nn.Parameter(value)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, made[id(parameter)])


def load_run_within(
    path: str | Path | TrainConfig,
    memory: int,
    limits: ExitStack | None,
    beam: int | None = None,
    max_length: int | None = None,
    refuse: bool = True,
):
    """(model, tokenizer, config, plan) of a run that translates inside ``memory`` bytes, which are enforced
    until ``limits`` ends.

    Weights are as training had them: dtypes, storage and lean layers; layers are streamed where nothing else fits.
    InputError where not even one of ``max_length`` tokens does and ``refuse`` says so.
    """
    if isinstance(path, TrainConfig):  # its model as it is before training
        return _load_within(RunFolder(Path(path.out)), path, None, memory, limits, beam, max_length, refuse)
    run = RunFolder(Path(path))
    config = run.read_config()
    with trained_weights(run, config) as weights:
        return _load_within(run, config, weights, memory, limits, beam, max_length, refuse)


def _load_within(
    run: RunFolder,
    config: TrainConfig,
    weights: Path | None,
    memory: int,
    limits: ExitStack | None,
    beam: int | None,
    max_length: int | None,
    refuse: bool,
):
    import petl_kernels as pk
    from petl_kernels.interop.adapters import fill_adapter
    from petl_kernels.interop.hf import load_skeleton
    from petl_kernels.models.structure import describe
    from petl_kernels.planning.load import load_planned
    from petl_kernels.planning.planner import plan_search
    from petl_kernels.planning.resident import SLOTS
    from petl_kernels.step import cap
    from petl_kernels.weights.streamed import stream_layers

    from .plan import prepared

    whole = weights is None or weights.name == run.model.name
    source = config.model if weights is None else weights if whole else config.model
    model, tokenizer = load_skeleton(source)
    like = copy.deepcopy(model).to("meta")
    like = like.requires_grad_(False) if whole else prepared(like, config)
    device = resolve()
    plan = plan_search(
        like,
        memory,
        ("dense", "dense") if whole else run_storages(run.path),
        config.beam if beam is None else beam,
        fitting_length(model, config.max_length if max_length is None else max_length),
        device,
        torch.bfloat16 if config.precision == "bf16" else None,
        refuse,
    )
    if limits is not None:
        limits.enter_context(cap.capped(memory, device))
    with folder_for_layers(plan, run.path) as folder:
        model = load_planned(source, model, like, plan, folder)
        if not whole:
            model = fill_adapter(prepared(model, config), weights)
        if plan.streamed:
            paths = [layer.path for layer in describe(model).layers[: plan.streamed]]
            stream_layers(model, paths, SLOTS, folder, sorted(folder.glob("*.safetensors")) if folder else (), device)
        pk.lean(model.eval(), 1)
    return model.requires_grad_(False).to(device), tokenizer, config, plan


def run_memory(path: str | Path | TrainConfig) -> int | None:
    """The budget in bytes that the run was trained under, if it was."""
    from petl_kernels.planning.plan import Plan
    from petl_kernels.units import parse_size

    if isinstance(path, TrainConfig):
        return None if path.memory is None else parse_size(path.memory)
    plan = RunFolder(Path(path)).plan
    return Plan.load(plan).memory if plan.exists() else None


def run_storages(path: str | Path) -> tuple[str, str]:
    """How the frozen weights were stored beside which the run has trained, in layers and in tables: "dense", "int8" or
    "nf4"."""
    from petl_kernels.planning.plan import Plan

    plan = RunFolder(Path(path)).plan
    if not plan.exists():
        return "dense", "dense"
    found = Plan.load(plan)
    return found.storage, found.tables


def merged_dtype(path: str | Path, name: str | None = None) -> torch.dtype:
    """What a merged run is written in: "fp32", "bf16" or "fp16", else as the checkpoint that it began with."""
    from petl_kernels.interop.hf import checkpoint_dtype

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is not None:
        return names[name]
    run = RunFolder(Path(path))
    found = checkpoint_dtype(run.model if run.model.is_dir() else run.read_config().model)
    return found if found in names.values() else torch.float32


def quantize_as_trained(model, config: TrainConfig, storages: tuple[str, str]) -> None:
    """The weights of a loaded run as its adapter was trained beside them."""
    from petl_kernels.weights.quantized import quantize_model

    from .prepare import cast_frozen_matrices

    if storages == ("dense", "dense"):
        raise InputError("into quantized: the run was trained beside weights that were not; expected --into original")
    quantize_model(model, *storages)
    if config.precision == "bf16":
        cast_frozen_matrices(model, torch.bfloat16)


class Translator:
    """A run that translates one of its language pairs; where it has not finished, with the best of it so far."""

    def __init__(
        self,
        run: str | Path | TrainConfig,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        beam: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        memory: str | int | None = None,
        limits: ExitStack | None = None,
    ) -> None:
        """run: its folder; a configuration stands for its model before training.

        memory: the budget, of the run itself when not given, kept until ``limits`` ends; without them it only
        decides how weights are loaded and how large batches are."""
        from petl_kernels.interop.languages import LanguagePair
        from petl_kernels.units import format_size, parse_size

        from .prepare import check_beam

        check_one_process()
        for name, value in (("beam", beam), ("max_length", max_length), ("batch_tokens", batch_tokens)):
            check_count(name, value)
        budget = run_memory(run) if memory is None else parse_size(memory)
        self.memory, self.autocast, search = None, contextlib.nullcontext, None
        with hush():
            if budget is None:
                self.model, tokenizer, self.config = load_run(run)
                self.model.to(resolve())
            else:
                self.model, tokenizer, self.config, plan = load_run_within(
                    run, budget, limits, beam, max_length, refuse=memory is not None
                )
                self.memory, search = format_size(budget), plan.search
                if self.config.precision == "bf16":
                    self.autocast = partial(torch.autocast, plan.device, torch.bfloat16)
        src_lang, self.tgt_lang = _languages(self.config, src_lang, tgt_lang)
        self.language = LanguagePair(self.model, tokenizer, src_lang, self.tgt_lang)
        self.beam = self.config.beam if beam is None else beam
        check_beam(self.beam, self.model)
        self.max_length = fitting_length(self.model, self.config.max_length if max_length is None else max_length)
        self.limit = BatchLimit(self.config.batch_tokens if batch_tokens is None else batch_tokens, search)
        self.window = max(128, self.limit.tokens // 32)  # lines that fill some batches, where lines come one by one
        self.cut = 0  # sources that were longer than max_length, or than the model's positions

    def stream(
        self, lines: list[str], at_once: int = 1024, told: Callable[[int], None] = lambda done: None
    ) -> Iterator[str]:
        """One translation for each line, in order; ``at_once`` lines are sorted by length and searched together.

        told: is called after each batch with the number of lines that are done.
        """
        with hush():
            for i in range(0, len(lines), at_once):
                results, cut = self._translate(lines[i : i + at_once], lambda done, first=i: told(first + done))
                self.cut += cut
                yield from results

    def _translate(self, lines: list[str], told: Callable[[int], None]) -> tuple[list[str], int]:
        def run(limit: BatchLimit) -> tuple[list[str], int]:
            return translate(self.model, self.language, lines, self.beam, self.max_length, limit, self.autocast, told)

        if self.memory is None:
            return run(self.limit)
        results, self.limit = until_it_fits(run, self.limit, self.memory, say)
        return results


def _languages(config: TrainConfig, src_lang: str | None, tgt_lang: str | None) -> tuple[str, str]:
    """The languages asked for, or those of a run that has only one pair."""
    pairs = {pair.name: pair for pair in config.train}
    if src_lang and tgt_lang:
        return src_lang, tgt_lang
    if len(pairs) > 1:
        raise InputError(f"the run has the pairs {', '.join(pairs)}: expected --src-lang and --tgt-lang")
    pair = next(iter(pairs.values()))
    return src_lang or pair.src_lang, tgt_lang or pair.tgt_lang


@contextlib.contextmanager
def folder_for_layers(plan, beside: Path) -> Iterator[Path | None]:
    """For the file that streamed layers are read from on the CPU; once that is mapped, it needs no name any more."""
    if plan is None or not plan.streamed or plan.device != "cpu":
        yield None
        return
    existing = next(folder for folder in (beside, *beside.resolve().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="petl-mt-", dir=existing) as name:
        yield Path(name)


@contextlib.contextmanager
def hush():
    """Without the chatter of transformers, which knows less about what we are doing than we do."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def absolute(path: str) -> str:
    """A path that still holds when the run is resumed from another folder."""
    return os.path.abspath(os.path.expanduser(path))
