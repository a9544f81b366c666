"""The memory plan of a run: made from a model without weights, before anything is loaded."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_outline
from petl_kernels.planning.plan import Plan
from petl_kernels.planning.planner import plan as make_plan

from .config import UNCAPTURED, TrainConfig
from .prepare import adapt, cast_frozen_matrices, check_beam, check_positions, set_dropout
from .runs import hush

MOST_OF_PLAIN = 1.2  # seconds of an update in a plan with CUDA graphs, over those of one without


def plan(config: TrainConfig, device: str | None = None) -> Plan:
    """The plan for ``config``, whose sentences are taken to be as long as ``max_length`` allows."""
    if config.memory is None:
        raise InputError("memory: not given; expected the budget to plan for, such as --memory 8GiB")
    if not config.model:
        raise InputError("model: not given; expected a folder, a hub id, or a config's JSON file")
    if config.is_new:
        raise InputError("model 'new': its vocabulary is learnt from the text; train it with --memory to see its plan")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}: expected cpu or cuda")
    config.check_settings()
    device = resolve(device)
    with hush():
        model = load_outline(config.model)
    check_positions(model, config.max_length)
    check_beam(config.beam, model)
    config = config.resolve(model.config.d_model)
    return plan_for(prepared(model, config), config, widened(config.max_length, device), device)


def widened(length: int, device: torch.device) -> int:
    """Returns the tokens that padded sentences of ``length`` tokens have at least."""
    multiple = width_multiple(device)
    return -(-length // multiple) * multiple


def width_multiple(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 1  # tiles of a GPU


def captures(config: TrainConfig, device: torch.device) -> bool:
    """Whether ``config`` wants steps on ``device`` captured as CUDA graphs, which is so where it does not say."""
    if config.cuda_graphs is not None:
        return config.cuda_graphs
    return device.type == "cuda" and config.tier not in UNCAPTURED


def prepared(model: nn.Module, config: TrainConfig) -> nn.Module:
    """``model`` with the method of ``config``, its dropout and its dtypes; on the meta device, too."""
    model = adapt(model, config)
    set_dropout(model, config.dropout, config.attention_dropout)
    if config.precision == "bf16":
        cast_frozen_matrices(model, torch.bfloat16)
    for parameter in model.parameters():  # biases that BitFit gives to a model that was read in 16 bits
        if parameter.requires_grad and parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    return model


def plan_for(model: nn.Module, config: TrainConfig, longest: int, device: torch.device) -> Plan:
    """Returns the plan of a run. Where ``config`` does not say whether, CUDA graphs have room in it if that rounds
    nothing more and an update takes a fifth more time at most: rates do not count the host, which graphs spare."""
    if config.cuda_graphs is not None or not captures(config, device):
        return _plan_for(model, config, longest, device, graphs=bool(config.cuda_graphs))
    without = _plan_for(model, config, longest, device, graphs=False)
    try:
        found = _plan_for(model, config, longest, device, graphs=True)
    except InputError:  # they have no room
        return without
    exact = set(found.approximations) <= set(without.approximations)
    return found if exact and found.seconds <= MOST_OF_PLAIN * without.seconds else without


def _plan_for(model: nn.Module, config: TrainConfig, longest: int, device: torch.device, graphs: bool) -> Plan:
    return make_plan(
        model,
        config.memory,
        config.batch_tokens,
        config.optimizer,
        max_length=longest,
        allow=config.allow,
        device=device.type,  # a plan holds for whichever card of a machine runs it
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        tier=config.tier,
        beam=config.beam,
        cuda_graphs=graphs,
        packed=True,
    )


def show(plan: Plan, json_path: str | None) -> None:
    """The table for a person; the plan as JSON where it is asked for."""
    if json_path == "-":
        json.dump(plan.to_dict(), sys.stdout, indent=1)
        print()
        return
    print(plan)
    if json_path:
        plan.save(json_path)
        print(f"written: {json_path}")
