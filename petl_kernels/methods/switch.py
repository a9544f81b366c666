"""The switch from one adapter of a model to another.

Base tensors that an adapter trains are exchanged: while it is active the model holds its values and its record the
base's, else the other way round. Both come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import Record, active_name, own, records
from petl_kernels.methods.pieces import pieces, run_pieces
from petl_kernels.methods.values import host_copy
from petl_kernels.models.structure import set_parameter

_followers: list[Callable[[nn.Module], None]] = []


def after_switch(follow: Callable[[nn.Module], None]) -> None:
    """Lets ``follow(model)`` run whenever another adapter of a model runs than before.

    Rooms above this one register here what depends on the active adapter, such as the memory of lean layers.
    """
    _followers.append(follow)


def switched(model: nn.Module) -> None:
    """Runs what ``after_switch`` was given; the last step of every change of the running adapter."""
    for follow in _followers:
        follow(model)


def activate(model: nn.Module, name: str | None) -> None:
    """Makes ``name`` the adapter that ``model`` runs and trains; None is the plain, frozen base."""
    current = active_name(model)
    if current is not None:
        record = records(model)[current]
        _exchange(model, record)
        for key in record.added:
            set_parameter(model, key, None)
    if name is not None or current is not None:
        own(model).active = name
    model.requires_grad_(False)
    run_pieces(model, name)
    if name is None:
        return
    record = records(model)[name]
    _exchange(model, record)
    for key, parameter in record.added.items():
        module: Any = model.get_submodule(key.rpartition(".")[0])
        _follow(parameter, module.weight)
        set_parameter(model, key, parameter)
    for parameter in _trained(model, name):
        parameter.requires_grad_(True)


def _exchange(model: nn.Module, record: Record) -> None:
    """Swaps the model's values of the record's base tensors with those that the record keeps."""
    with torch.no_grad():
        for key, other in record.base.items():
            parameter = model.get_parameter(key)
            record.base[key] = host_copy(parameter)
            parameter.copy_(other)


def _follow(added: nn.Parameter, weight: Tensor) -> None:
    """Gives ``added`` device and dtype of its module's weight: ``model.to`` does not reach what is not in the model."""
    if (added.device, added.dtype) != (weight.device, weight.dtype):
        added.data = added.data.to(weight.device, weight.dtype)


def _trained(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Returns the parameters that the active adapter ``name`` trains."""
    record = records(model)[name]
    own_parameters = [parameter for _, piece in pieces(model, name) for parameter in piece.parameters()]
    return [*own_parameters, *(model.get_parameter(key) for key in record.base), *record.added.values()]


def refuse_merged(model: nn.Module, doing: str) -> None:
    """Raises InputError where the active adapter is merged; ``doing`` names what needs it unmerged."""
    name = active_name(model)
    if name is not None and records(model)[name].merged:
        raise InputError(f"adapter {name!r}: merged into the model, unmerge it before {doing}")
