"""The tensors that an adapter stores, and those that its training goes on from.

Keys are "<module path in the plain model>.<suffix>", without the adapter's name and without any wrapper;
``petl_kernels.interop`` relies on that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import active_name, find_record
from petl_kernels.methods.pieces import pieces


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns what the adapter ``name`` stores: key -> detached tensor, of the model's own memory where it can be.

    A reparametrised prefix is stored folded.
    """
    record = find_record(model, name)
    state = {f"{path}.{suffix}": t for path, piece in pieces(model, name) for suffix, t in piece.state().items()}
    for key, kept in record.base.items():
        state[key] = model.get_parameter(key) if name == active_name(model) else kept
    state.update(record.added)
    return {key: tensor.detach() for key, tensor in state.items()}


def load_adapter_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Puts ``state`` into the adapter ``name``; values are cast to the dtype that the model has for them.

    Raises InputError for a missing, surplus or misshapen tensor, before anything is changed.
    """
    if find_record(model, name).merged:
        raise InputError(f"adapter {name!r}: merged into the model, unmerge it before loading its tensors")
    _check_state(name, state, adapter_state(model, name))
    for _, piece in pieces(model, name):
        piece.fold()
    with torch.no_grad():
        for key, tensor in adapter_state(model, name).items():
            tensor.copy_(state[key])


def training_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns what training ``name`` goes on from, where that is another form than ``adapter_state``; else empty."""
    return {
        f"{path}.{suffix}": t for path, piece in pieces(model, name) for suffix, t in piece.training_state().items()
    }


def load_training_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Puts back what ``training_state`` returned. Raises InputError as ``load_adapter_state`` does."""
    expected = training_state(model, name)
    _check_state(name, state, expected)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(state[key])


def _check_state(name: str, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state]
    if missing:
        raise InputError(f"adapter {name!r}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are)")
    surplus = [key for key in state if key not in expected]
    if surplus:
        raise InputError(f"adapter {name!r}: tensor {surplus[0]!r} has no place in it ({len(surplus)} have none)")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            found, wanted = tuple(state[key].shape), tuple(tensor.shape)
            raise InputError(f"adapter {name!r}: tensor {key!r} has shape {found}, expected {wanted}")
