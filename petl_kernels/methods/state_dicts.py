"""``state_dict`` and ``load_state_dict`` of an adapted model.

A state has the pieces of all adapters, and the values that base tensors have with the active one. The base tensors of
the other adapters stand beside them as "petl_aside.<adapter>.<tensor>", and the active one's name in the metadata. A
state that was saved with another adapter active is refused where its values would be taken for others.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import adapter_parameters, owner

ASIDE = "petl_aside."
_ACTIVE = "petl_active"


def watch(model: nn.Module) -> None:
    """Lets the states of an adapted ``model`` hold all of its adapters; hooks a model once."""
    if _report_missing not in model._load_state_dict_post_hooks.values():
        model.register_state_dict_post_hook(_put_aside)
        model.register_load_state_dict_pre_hook(_take_aside)
        model.register_load_state_dict_post_hook(_report_missing)


def _aside(model: nn.Module) -> dict[str, Tensor]:
    """Returns, by key, the base tensors of the adapters that are not active."""
    found = {}
    for name, record in owner(model).adapters.items():
        if name != owner(model).active:
            kept = {**record.base, **record.added}
            found |= {f"{ASIDE}{name}.{key}": tensor for key, tensor in kept.items()}
    return found


def _put_aside(model: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    if owner(model).base_only:
        for key in adapter_parameters(model):
            state.pop(prefix + key, None)
        return
    metadata[_ACTIVE] = owner(model).active
    state.update({prefix + key: tensor.detach() for key, tensor in _aside(model).items()})


def _take_aside(model, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
    _check_active(model, metadata)
    with torch.no_grad():
        for key, tensor in _aside(model).items():
            value = state.pop(prefix + key, None)
            if value is None:
                missing.append(prefix + key)
            elif value.shape != tensor.shape:
                errors.append(f"{key}: shape {tuple(value.shape)}, expected {tuple(tensor.shape)}")
            else:
                tensor.copy_(value)


def _check_active(model: nn.Module, metadata: dict) -> None:
    saved, here = metadata.get(_ACTIVE), owner(model).active
    if _ACTIVE not in metadata or saved == here:
        return
    for name in (saved, here):
        record = None if name is None else owner(model).adapters.get(name)
        if record is not None and (record.base or record.added):
            raise InputError(
                f"load_state_dict: saved with adapter {saved!r} active, and {here!r} is: "
                f"pk.use_adapter(model, {saved!r}) before loading"
            )


def _report_missing(model: nn.Module, incompatible) -> None:
    """Warns of adapters that keep their values, which ``strict=False`` would let pass in silence."""
    own = adapter_parameters(model)
    left = [key for key in incompatible.missing_keys if key in own or key.startswith(ASIDE)]
    if owner(model).base_only:  # they come from elsewhere
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in left]
    elif left:
        warnings.warn(
            f"load_state_dict: no values for {left[0]!r} and {len(left) - 1} more of adapters, which stay as they are",
            stacklevel=3,
        )
