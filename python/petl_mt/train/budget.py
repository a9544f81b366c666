"""The plan that keeps a run inside its budget of memory: made for the run, or given to it and checked.

A plan is made from a model without weights, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_outline
from petl_kernels.planning.plan import Plan, host_peak
from petl_kernels.planning.planner import host_limit
from petl_kernels.planning.planner import plan as make_plan
from petl_kernels.units import format_below, format_least, format_size, parse_size
from petl_kernels.weights.quantized import storages_of

from ..config import UNCAPTURED, TrainConfig
from ..models.adapt import prepare_model
from ..models.load import check_beam, check_positions, width
from ..models.precision import product_dtype, with_precision
from ..runs import RunFolder
from ..silence import hush

MOST_OF_PLAIN = 1.2  # seconds of an update in a plan with CUDA graphs, over those of one without


def plan_without_text(config: TrainConfig, device: str | None = None) -> Plan:
    """Returns the plan for ``config``, whose sentences are taken to be as long as ``max_length`` allows.

    device: "cpu" or "cuda"; None is what is here. Raises InputError for what cannot be planned.
    """
    if config.memory is None:
        raise InputError("memory: not given; expected the budget to plan for, such as --memory 8GiB")
    if not config.model:
        raise InputError("model: not given; expected a folder, a hub id, or a config's JSON file")
    if config.is_new:
        raise InputError("model 'new': its vocabulary is learnt from the text; train it with --memory to see its plan")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}: expected cpu or cuda")
    config.check_settings()
    place = resolve(device)
    with hush():
        model = cast("Any", load_outline(config.model))
    check_positions(model, config.max_length)
    check_beam(config.beam, model)
    config = with_precision(config.resolve(width(model)), place)
    return plan_for(prepare_model(model, config), config, widened(config.max_length, place), place)


def plan_of_run(
    model: nn.Module, config: TrainConfig, run: RunFolder, longest: int, device: torch.device, text: int = 0
) -> Plan:
    """Returns the plan under ``--memory``: the given one, that of a resumed run, or the fastest for this model.

    model: as it will be trained, on the meta device. longest: tokens of the longest sentence, padding included. text:
    bytes of the tokenised text. Raises InputError for a plan that was made for something else.
    """
    assert config.memory is not None
    memory = parse_size(config.memory)
    given, own = config.plan, run.plan
    if given is None and own.exists() and torch.device(Plan.load(own).device).type == device.type:
        given = own  # resumed: the same storage and optimiser, whatever the rates are today
    if given is None:
        return plan_for(model, config, longest, device, text)
    if device.type == "cpu" and text >= memory:
        raise InputError(f"memory {format_below(memory, text)}: the tokenised text alone takes {format_least(text)}")
    plan = Plan.load(given)
    plan.check(model)
    held = storages_of(model)
    for planned, there in zip((plan.storage, plan.tables), held, strict=True):
        if there not in ("dense", planned):
            raise InputError(
                f"plan {given}: for weights in {planned}; the checkpoint has them in {there}; expected a plan made anew"
            )
    if plan.memory != memory:
        raise InputError(
            f"plan {given}: for {format_size(plan.memory)}; expected one for the {format_size(memory)} of --memory"
        )
    host, need = host_limit(device, memory, config.host_memory, text), host_peak(plan.host)
    if host is not None and need > host:
        raise InputError(
            f"plan {given}: takes {format_least(need)} of host memory, and {format_below(host, need)} are "
            f"{'--host-memory' if config.host_memory else 'free'}; expected a plan made anew"
        )
    if torch.device(plan.device).type != device.type:
        raise InputError(f"plan {given}: for {plan.device}; expected one for {device.type}")
    if config.cuda_graphs and not plan.cuda_graphs and given != own:  # its own may have been tightened
        raise InputError(
            f"plan {given}: has no room for CUDA graphs, or uses what they cannot hold; expected one made with "
            "--cuda-graphs, or a run without it"
        )
    if plan.precision != config.precision:
        raise InputError(
            f"plan {given}: for products in {plan.precision}; expected one for the {config.precision} of --precision"
        )
    if plan.batch_tokens != config.batch_tokens:
        raise InputError(
            f"plan {given}: for updates of {plan.batch_tokens} tokens; expected the {config.batch_tokens} of "
            "--batch-tokens"
        )
    chosen = [] if held == ("dense", "dense") else ["quantized"]  # by naming such a checkpoint
    forbidden = plan.forbidden([*config.allow, *chosen], config.optimizer)
    if forbidden:
        raise InputError(f"plan {given}: uses {forbidden}; expected --allow {forbidden} beside it")
    if plan.longest < longest:
        raise InputError(f"plan {given}: for sentences of {plan.longest} tokens; the text has some of {longest}")
    return plan


def plan_for(model: nn.Module, config: TrainConfig, longest: int, device: torch.device, text: int = 0) -> Plan:
    """Returns the fastest plan of a run with sentences of ``longest`` tokens and ``text`` bytes of tokenised text."""

    def fastest(graphs: bool) -> Plan:
        return _fastest(model, config, longest, device, graphs, text)

    if config.cuda_graphs is not None or not wants_graphs(config, device):
        return fastest(bool(config.cuda_graphs))
    return with_graphs_where_near(fastest)


def with_graphs_where_near(fastest: Callable[[bool], Plan]) -> Plan:
    """Returns the fastest plan where CUDA graphs are left open. fastest: of whether the plan has room for graphs.

    It has if that rounds nothing more and an update takes a fifth more time at most: planned times leave out the host,
    whose time graphs spare.
    """
    without = fastest(False)
    try:
        found = fastest(True)
    except InputError:  # they have no room
        return without
    exact = set(found.approximations) <= set(without.approximations)
    return found if exact and found.seconds <= MOST_OF_PLAIN * without.seconds else without


def wants_graphs(config: TrainConfig, device: torch.device) -> bool:
    """Returns whether steps on ``device`` are to be captured as CUDA graphs; on CUDA that is the default."""
    if config.cuda_graphs is not None:
        return config.cuda_graphs
    return device.type == "cuda" and config.tier not in UNCAPTURED


def widened(length: int, device: torch.device) -> int:
    """Returns the tokens that padded sentences of ``length`` tokens have at least."""
    multiple = width_multiple(device)
    return -(-length // multiple) * multiple


def width_multiple(device: torch.device) -> int:
    """Returns the number that widths of padded batches are multiples of: a GPU computes in tiles."""
    return 8 if device.type == "cuda" else 1


def _fastest(
    model: nn.Module, config: TrainConfig, longest: int, device: torch.device, graphs: bool, text: int = 0
) -> Plan:
    assert config.memory is not None
    return make_plan(
        model,
        config.memory,
        config.batch_tokens,
        config.optimizer,
        max_length=longest,
        allow=config.allow,
        device=device.type,  # a plan holds for whichever card of a machine runs it
        autocast=product_dtype(config),
        tier=config.tier,
        beam=config.beam,
        cuda_graphs=graphs,
        packed=True,
        host_memory=config.host_memory,
        host_data=text,
    )
