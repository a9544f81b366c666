"""Adapters are put on a model, and one of them is chosen."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from petl_kernels.errors import InputError, shown
from petl_kernels.methods.base import Method
from petl_kernels.methods.foreign import check_adaptable, check_unwrapped
from petl_kernels.methods.owner import Record, active_name, adapter_parameters, find_record, own, records
from petl_kernels.methods.pieces import Named, discard_pieces
from petl_kernels.methods.state_dicts import watch
from petl_kernels.methods.switch import activate, refuse_merged, switched
from petl_kernels.methods.values import host_copy
from petl_kernels.ops.quantized import QuantizedTensor

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def adapt(model: nn.Module, config: Method, name: str = "default") -> nn.Module:
    """Freezes ``model``, puts what ``config`` trains into it under ``name``, makes that active and returns the model.

    The model is changed in place; its modules keep their paths and its parameters their names. Several adapters can be
    on one model under different names: one of them is active at a time (``use_adapter``).
    Raises InputError, with the model as it was: a name that is taken or no name, targets that match nothing, a rank
    larger than a layer, a model of a family that it does not cover, one that is wrapped (DataParallel, compiled)
    or that PEFT or a parametrization has changed.
    """
    check_adaptable(model)
    if not isinstance(config, Method):
        raise InputError(f"config {shown(config)}: expected a method's config, such as LoRA(rank=16)")
    _check_new_name(model, name)
    refuse_merged(model, "adapting")
    before, required = active_name(model), set(trainable_parameters(model))
    activate(model, None)
    try:
        _add(model, config, name)
    except Exception:
        discard_pieces(model, name)
        activate(model, before)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in required)
        raise
    activate(model, name)
    switched(model)
    return model


def use_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Makes ``name`` the adapter that ``model`` runs and trains; None is the plain, frozen base. Returns the model.

    Base tensors that an adapter has trained are swapped in and out exactly.
    """
    check_unwrapped(model)
    if name is not None:
        find_record(model, name)
    if name != active_name(model):
        refuse_merged(model, "switching")
        activate(model, name)
        switched(model)
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of ``model`` that require grad, shared ones once, for an optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _add(model: nn.Module, config: Method, name: str) -> None:
    """Puts ``config`` as the adapter ``name`` into ``model``, no adapter of which is active."""
    record = Record(config)
    config.inject(model, name)
    trained = {key: model.get_parameter(key) for key in config.base_tensors(model)}
    for key, parameter in trained.items():
        if isinstance(parameter, QuantizedTensor):
            raise InputError(
                f"{config.label}: it trains {key!r}, which is quantized ({parameter.storage}): expected a dense weight"
            )
    record.base = {key: host_copy(parameter) for key, parameter in trained.items()}
    record.added = {key: nn.Parameter(value) for key, value in config.added_tensors(model).items()}
    own(model).adapters[name] = record
    watch(model)
    _keep_out_of_checkpoints(model)


def _keep_out_of_checkpoints(model: Any) -> None:
    """Lets ``save_pretrained`` write the plain model: adapters have files of their own."""
    if hasattr(model, "_keys_to_ignore_on_save"):
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *adapter_parameters(model)}


def _check_new_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"adapter name {shown(name)}: expected letters, digits, - and _")
    if hasattr(Named(), name):  # names are keys of module dictionaries
        raise InputError(f"adapter name {name!r}: an attribute of PyTorch modules, choose another name")
    if name in records(model):
        raise InputError(f"adapter {name!r}: already on this model, choose another name")
