"""The active adapter is put into the base weights, and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.foreign import check_unwrapped
from petl_kernels.methods.owner import Record, active_name, records
from petl_kernels.methods.pieces import run_pieces
from petl_kernels.methods.switch import activate, refuse_merged, switched
from petl_kernels.methods.values import stored_as
from petl_kernels.models.structure import set_parameter
from petl_kernels.ops.quantized import QuantizedTensor


def merge(model: nn.Module) -> nn.Module:
    """Puts the active adapter into the base weights: the plain model then computes what the adapted one did.

    A quantized weight is quantized again, one after the other, and so rounded: ``report`` has the largest relative
    error. To merge without it, put the adapter on the original checkpoint. A tied weight that changes in one place only
    (LoRA on the output projection) is untied, in the config too. The weights from before are kept in host memory for
    ``unmerge``. Methods that train base tensors have nothing to merge.
    Raises InputError for methods that no weight can hold (bottleneck adapters, prefixes, BitFit on T5).
    """
    check_unwrapped(model)
    name = active_name(model)
    if name is None:
        raise InputError("merge: no adapter of the model is active")
    refuse_merged(model, "merging")
    record = records(model)[name]
    new, errors = {}, []
    for key, values in record.config.merged_weights(model, name):
        new[key], error = stored_as(model.get_parameter(key), values)
        errors += [error] if error is not None else []
        del values  # before the next are made
    record.unmerged, record.merge_error = {}, max(errors, default=None)
    for key, tensor in _untied(model, record, new).items():
        record.unmerged[key] = model.get_parameter(key)
        set_parameter(model, key, nn.Parameter(tensor, requires_grad=False))
    for original in set(record.unmerged.values()):  # no module holds them now
        if not original.is_meta:
            _move(original, torch.device("cpu"))
    run_pieces(model, None)
    model.requires_grad_(False)
    switched(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes ``merge``: the weights of before, bit for bit, with their ties, and the adapter beside them."""
    check_unwrapped(model)
    name = active_name(model)
    if name is None or not records(model)[name].merged:
        raise InputError("unmerge: no adapter of the model is merged")
    record = records(model)[name]
    for key, original in (record.unmerged or {}).items():
        _move(original, model.get_parameter(key).device)
        set_parameter(model, key, original)
    record.unmerged = record.merge_error = None
    if record.was_tied:
        config: Any = model.config
        config.tie_word_embeddings, record.was_tied = True, False
    activate(model, name)
    switched(model)
    return model


def _untied(model: nn.Module, record: Record, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns ``new`` with a copy for every parameter that is tied to one in it, and clears the config's tie."""
    names: dict[nn.Parameter, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(key)
    # all of a tied group become parameters of their own, since transformers ties all of it or none
    copies = {
        other: parameter.detach().clone()
        for parameter, group in names.items()
        if len(group) > 1 and not new.keys().isdisjoint(group)
        for other in group
        if other not in new
    }
    config: Any = getattr(model, "config", None)
    if copies and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings, record.was_tied = False, True
    return {**copies, **new}


def _move(parameter: nn.Parameter, device: torch.device) -> None:
    """Moves ``parameter`` in place, so that a tied one stays one."""
    if parameter.device == device:
        return
    if isinstance(parameter, QuantizedTensor):  # its data cannot change device
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.to(device), requires_grad=False))
    else:
        parameter.data = parameter.data.to(device)
