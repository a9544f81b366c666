"""The model of a run, loaded whole, or inside a budget of memory."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import petl_kernels as pk
from petl_kernels.device import resolve
from petl_kernels.interop.adapters import fill_adapter
from petl_kernels.interop.hf import load_pretrained, load_skeleton
from petl_kernels.layers.wide_linear import widen_linears
from petl_kernels.models.structure import describe
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan
from petl_kernels.planning.planner import SearchPlan, host_limit, plan_search
from petl_kernels.planning.resident import SLOTS
from petl_kernels.step import cap
from petl_kernels.units import parse_size
from petl_kernels.weights.quantized import storages_of
from petl_kernels.weights.streamed import stream_layers

from ..config import TrainConfig
from ..evaluate import fitting_length
from ..models.adapt import prepare_model
from ..models.precision import product_dtype
from ..models.streamed_layers import folder_for_layers
from ..runs import RunFolder
from .trained_weights import trained_weights


def load_run(path: str | Path | TrainConfig) -> tuple[Any, Any, TrainConfig]:
    """Returns (model, tokenizer, config) of a run, at its best step and ready to translate.

    path: its folder; a configuration stands for its model before training.
    """
    if isinstance(path, TrainConfig):
        return *load_pretrained(path.model), path
    run = RunFolder(Path(path))
    config = run.read_config()
    with trained_weights(run, config) as weights:
        if weights.name == run.model.name:
            return *load_pretrained(weights), config
        model, tokenizer = load_pretrained(config.model)
        return pk.load_adapter(model, weights).eval(), tokenizer, config


def load_run_within(
    path: str | Path | TrainConfig,
    memory: int,
    limits: ExitStack | None,
    beam: int | None = None,
    max_length: int | None = None,
    refuse: bool = True,
    host_memory: str | int | None = None,
) -> tuple[Any, Any, TrainConfig, SearchPlan]:
    """Returns (model, tokenizer, config, plan) of a run that translates inside ``memory`` bytes.

    The budget is enforced until ``limits`` ends. Weights are as training had them: dtypes, storage and lean layers;
    layers are streamed where nothing else fits. beam, max_length: those of the run where None. Raises InputError where
    ``refuse`` is true and not even one sentence of ``max_length`` tokens fits. host_memory: what weights may take of
    the host beside a CUDA device; that of the run, or what is free, where None. Raises InputError where they take more.
    """
    options = memory, limits, beam, max_length, refuse, host_memory
    if isinstance(path, TrainConfig):
        return _load_within(RunFolder(Path(path.out)), path, None, *options)
    run = RunFolder(Path(path))
    config = run.read_config()
    with trained_weights(run, config) as weights:
        return _load_within(run, config, weights, *options)


def _load_within(
    run: RunFolder,
    config: TrainConfig,
    weights: Path | None,
    memory: int,
    limits: ExitStack | None,
    beam: int | None,
    max_length: int | None,
    refuse: bool,
    host_memory: str | int | None,
) -> tuple[Any, Any, TrainConfig, SearchPlan]:
    """weights: the run's adapter/ or model/; None for the model before training."""
    whole = weights is None or weights.name == run.model.name
    source = config.model if weights is None else weights if whole else config.model
    model, tokenizer = load_skeleton(source)
    if whole and product_dtype(config) == torch.float16:
        widen_linears(model)  # as in training, where the others become so when they are prepared
    like = copy.deepcopy(model).to("meta")
    like = like.requires_grad_(False) if whole else prepare_model(like, config)
    device = resolve()
    plan = plan_search(
        like,
        memory,
        _storages(like, ("dense", "dense") if whole else run_storages(run.path)),
        config.beam if beam is None else beam,
        fitting_length(model, config.max_length if max_length is None else max_length),
        device,
        product_dtype(config),
        refuse,
        _host_limit(config, device, memory, host_memory),
    )
    if limits is not None:
        limits.enter_context(cap.capped(memory, device))
    with folder_for_layers(plan, like, run.path) as folder:
        model = load_planned(source, model, like, plan, folder)
        if weights is not None and not whole:
            model = fill_adapter(prepare_model(model, config), weights)
        if plan.streamed:
            paths = [layer.path for layer in describe(model).layers[: plan.streamed]]
            stream_layers(model, paths, SLOTS, folder, sorted(folder.glob("*.safetensors")) if folder else (), device)
        pk.lean(model.eval(), 1)
    return model.requires_grad_(False).to(device), tokenizer, config, plan


def _host_limit(config: TrainConfig, device: torch.device, memory: int, host_memory: str | int | None) -> int | None:
    """Returns what weights may take of the host; a limit of the run is one beside a card, and is none on a CPU."""
    if host_memory is None and device.type == "cuda":
        host_memory = config.host_memory
    return host_limit(device, memory, host_memory)


def _storages(like: Any, trained: tuple[str, str]) -> tuple[str, str]:
    """Returns the storages that training had, or those of a checkpoint that was quantized once."""
    in_layers, in_tables = (
        there if kind == "dense" else kind for kind, there in zip(trained, storages_of(like), strict=True)
    )
    return in_layers, in_tables


def run_memory(path: str | Path | TrainConfig) -> int | None:
    """Returns the budget in bytes that the run was trained under, None where there was none."""
    if isinstance(path, TrainConfig):
        return None if path.memory is None else parse_size(path.memory)
    plan = RunFolder(Path(path)).plan
    return Plan.load(plan).memory if plan.exists() else None


def run_storages(path: str | Path) -> tuple[str, str]:
    """Returns the storages ("dense", "int8" or "nf4") of frozen layers and of frozen tables in the run's training."""
    path = RunFolder(Path(path)).plan
    if not path.exists():
        return "dense", "dense"
    plan = Plan.load(path)
    return plan.storage, plan.tables or plan.storage
