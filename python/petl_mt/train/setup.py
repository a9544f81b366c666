"""Everything that a run needs before its first update."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.device import resolve
from petl_kernels.files import atomic_dir
from petl_kernels.planning.beam_search import output_length
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan
from petl_kernels.planning.resident import OPTIMIZER_BYTES
from petl_kernels.step import cap
from petl_kernels.step.graphs import check_device
from petl_kernels.units import parse_size

from ..checks import check_space, little_effect
from ..config import ResolvedConfig, TrainConfig
from ..data import TrainBatches
from ..evaluate import BatchLimit
from ..json_file import write_json
from ..memory_meter import MemoryMeter
from ..models.adapt import prepare_model
from ..models.load import check_beam, check_positions, is_read_later, load_model, width
from ..models.precision import precision_of, with_precision
from ..models.streamed_layers import folder_for_layers
from ..runs import RunFolder
from ..runs.checkpoint import Checkpoints
from ..runs.lock import locked
from ..runs.log import RunLog
from .batching import choose_packing, longest_captured
from .budget import plan_of_run, widened, width_multiple
from .optimizer import make_accelerator, make_optimizer, undecayed
from .progress import Progress
from .resume import checkpoint_to_resume, with_settings_of
from .step_log import StepLog
from .text import TokenisedText, read_text, tokenise
from .update import Update


@dataclass
class EvaluationLimit:
    """The largest batch of evaluations, which is lowered where a budget turns out to be too small for it."""

    batch: BatchLimit


@dataclass(frozen=True)
class Setup:
    """A run before its first update, or before the next one where it is resumed."""

    config: ResolvedConfig
    folder: RunFolder
    quiet: bool
    device: torch.device
    accelerator: Any
    model: nn.Module
    tokenizer: Any
    text: TokenisedText
    batches: TrainBatches
    plan: Plan | None  # under a budget of memory
    optimizer: Any
    update: Update
    evaluation_limit: EvaluationLimit
    progress: Progress
    checkpoints: Checkpoints
    log: RunLog
    step_log: StepLog
    meter: MemoryMeter
    stored_parameters: int  # of the adapter or model that the run writes
    total_parameters: int  # of the model without what was added to it


def set_up(
    config: TrainConfig, run: RunFolder, resuming: bool = False, quiet: bool = False, limits: ExitStack | None = None
) -> Setup:
    """Reads and checks every input, loads the model, and prepares the run's folder.

    limits: holds the cap on memory and the lock of a new run until it ends; without it there are neither. Raises
    InputError for what a user can mend, before anything is written.
    """
    if config.plan is not None:
        Plan.load(config.plan)  # refused now, not after the text has been read
    lines = read_text(config, run, resuming, quiet)

    if config.memory is not None:
        cap.expand_segments()
    before = run.read_config() if resuming else None
    if before is not None:
        config = with_settings_of(before, config)
    config = with_precision(config, resolve())
    accelerator = make_accelerator(precision_of(config))
    device = resolve(accelerator.device)
    if config.cuda_graphs:
        check_device(device)
    torch.manual_seed(config.seed)

    # the model, without weights where a plan has to be made first
    meter = MemoryMeter(device)
    vocabulary = run.vocabulary if resuming and run.vocabulary.is_dir() else None
    model, tokenizer = load_model(config, vocabulary, lines.train, quiet)
    check_positions(model, config.max_length)
    config = config.resolve(width(model))
    if before is not None:
        run.check_same(config)
    check_beam(config.beam, model)
    text = tokenise(lines, config, model, tokenizer, quiet)
    batches = TrainBatches(text.train, config.batch_tokens, config.seed, width_multiple(device))

    # the plan, the weights and the optimiser
    total_parameters = stored_parameters = sum(p.numel() for p in model.parameters())
    plan, like = None, None
    if config.memory is not None or is_read_later(config):
        like = _on_meta_device(model, config)
    if like is not None and config.memory is not None:
        longest = widened(int(text.train.lengths.max()), device)
        plan = plan_of_run(like, config, run, longest, device, text.nbytes)
        if limits is not None:
            left = parse_size(config.memory) - (text.nbytes if device.type == "cpu" else 0)
            limits.enter_context(cap.capped(left, device))
            meter = MemoryMeter(device)  # what a budget counts begins here
    meter.text_bytes = text.nbytes
    model = _load_weights(model, like, config, plan, run).to(device)
    meter.watch(model)
    if config.method != "full":
        stored_parameters = pk.report(model).stored
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer_name = plan.optimizer if plan else config.optimizer
    optimizer = accelerator.prepare(make_optimizer(parameters, undecayed(model), config, optimizer_name))

    # the folder, and the state that a resumed run goes on from
    _check_space(run, parameters, optimizer_name)
    checkpoints, notes = Checkpoints(run.checkpoints), lines.notes + little_effect(config)
    latest = None
    if before is not None:
        latest, more = checkpoint_to_resume(checkpoints, config, before)
        notes += more
    _prepare_folder(run, config, before, tokenizer, lines.sums, limits)
    progress = Progress(vectors_decay=False)
    if latest is not None:
        progress = Progress(**checkpoints.load(latest, model, optimizer))
        progress.packed = bool(progress.packed)  # runs of earlier versions have padded batches
        notes += _no_more_decay(progress, model, config)

    log = RunLog(run.path, config.steps, progress.step, config.tensorboard, quiet)
    for line in [*notes, *(count.line() for count in text.counts)]:
        log.say(line)
    log.say(
        f"{config.method}: {stored_parameters:,} of {total_parameters:,} parameters "
        f"({stored_parameters / total_parameters:.3%}), lr {config.lr:g}, {device}, {config.precision}"
    )
    if plan:
        plan.save(run.plan)
        _tell_plan(plan, config, log)
    if progress.step:
        log.say(f"resumed after step {progress.step}")
    batches.start = choose_packing(model, config, run, progress, text, log)
    longest = longest_captured(config, plan, progress, device, text, log)
    pad = tokenizer.pad_token_id
    update = Update(model, optimizer, accelerator, config, plan, text.start, pad, log.say, longest=longest)
    update.loss_scale.load(progress.loss_scale)
    return Setup(
        config=config,
        folder=run,
        quiet=quiet,
        device=device,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        text=text,
        batches=batches,
        plan=plan,
        optimizer=optimizer,
        update=update,
        evaluation_limit=EvaluationLimit(
            BatchLimit(plan.evaluation_tokens, plan.search) if plan else BatchLimit(config.batch_tokens)
        ),
        progress=progress,
        checkpoints=checkpoints,
        log=log,
        step_log=StepLog(config, progress, log, checkpoints, meter, device),
        meter=meter,
        stored_parameters=stored_parameters,
        total_parameters=total_parameters,
    )


def _on_meta_device(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Returns the model as it will be trained, on the meta device."""
    with torch.random.fork_rng():
        return prepare_model(copy.deepcopy(model).to("meta"), config)


def _load_weights(
    model: nn.Module, like: nn.Module | None, config: TrainConfig, plan: Plan | None, run: RunFolder
) -> nn.Module:
    """Returns the model with its weights, its method and its tiers, in the storage and the place that a plan has."""
    with folder_for_layers(plan, like, run.path) as folder:
        if like is not None and is_read_later(config):
            model = load_planned(config.model, model, like, plan, folder)
        torch.manual_seed(config.seed)  # what is added starts the same, whatever was made before it
        model = prepare_model(model, config)
        if plan:
            plan.apply(model, folder, sorted(folder.glob("*.safetensors")) if folder else [])
        else:
            pk.lean(model, 1 if config.tier is None else config.tier)
    return model


def _no_more_decay(progress: Progress, model: nn.Module, config: TrainConfig) -> list[str]:
    """Returns a line where a run of an earlier version goes on without the decay of vectors in two dimensions."""
    before, progress.vectors_decay = progress.vectors_decay, False
    if not before or not config.weight_decay or all(p.dim() <= 1 for p in undecayed(model)):
        return []
    return [f"{config.method}: weight decay has drawn its factors to 0 up to step {progress.step}, and leaves them now"]


def _check_space(run: RunFolder, parameters: list[nn.Parameter], optimizer: str) -> None:
    """Raises InputError for a disk without room for three checkpoints (latest, best, the next) and the result."""
    trained = sum(p.nbytes for p in parameters)
    state = sum(map(OPTIMIZER_BYTES[optimizer], parameters))
    need = 3 * (trained + state) + trained
    there = sum(path.stat().st_size for path in run.checkpoints.glob("*/*") if not path.parent.is_symlink())
    check_space("out", run.path, max(0, need - there), "checkpoints and the result")


def _prepare_folder(
    run: RunFolder,
    config: TrainConfig,
    before: TrainConfig | None,
    tokenizer,
    sums: dict[str, dict],
    limits: ExitStack | None,
) -> None:
    """Writes what a run's folder has from its beginning; before: the configuration of a run that is resumed."""
    run.path.mkdir(parents=True, exist_ok=True)
    if before is None:
        if limits is not None:
            limits.enter_context(locked(run.path))
            run.check_free()  # once more: another process may have begun here meanwhile
        write_json(run.text, sums)
    if before != config:
        run.write_config(config)
    if config.is_new and not run.vocabulary.exists():
        with atomic_dir(run.vocabulary) as temporary:
            tokenizer.save_pretrained(temporary)


def _tell_plan(plan: Plan, config: TrainConfig, log: RunLog) -> None:
    for line in str(plan).splitlines():
        log.say(line)
    search, longest = plan.search, plan.longest
    if config.valid and search and not search.rows(longest, output_length(longest, config.max_length)):
        log.say(
            f"the search with {config.beam} beams has no room for a sentence of {longest} tokens; where validation "
            "text has one, the run ends without scores (a smaller --beam takes less)"
        )
