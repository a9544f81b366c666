"""The frozen weights of a model in 8 or 4 bits, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.layers.lean import LeanLayer, narrow
from petl_kernels.methods.lora import with_lengths_that_follow
from petl_kernels.methods.owner import records
from petl_kernels.models.structure import base_modules
from petl_kernels.models.transformers_names import head_linear
from petl_kernels.ops.quantized import STORAGES, QuantizedTensor, quantize


def quantize_model(model: nn.Module, storage: str, tables: str | None = None) -> nn.Module:
    """Holds the frozen weights of ``model``'s linear layers and token embeddings in ``storage``; returns the model.

    storage: "int8" or "nf4". tables: that of token embeddings and of the output projection, where it is another. Either
    may be "dense", which leaves its weights as they are. Weights are quantized one after the other, so that at most one
    exists twice. Tied weights stay tied. Norms, biases, embeddings of positions and adapters are left as they are, and
    so is every weight that is trained or that an adapter of the model trains while it is active. A weight that is
    quantized already stays in its storage.

    Raises InputError: another storage, a model without a frozen weight (adapt it first, or ``requires_grad_(False)``).
    """
    _check(storage, tables)
    places = quantizable(model)
    if not places:
        raise InputError(
            f"quantize_model: {type(model).__name__} has no frozen linear layer or embedding: expected a frozen model"
        )
    if storage != "dense":
        for module in model.modules():
            if isinstance(module, LeanLayer):
                narrow(module)
    with with_lengths_that_follow(model):
        for owners in places:
            weight: Any = owners[0].weight
            wanted = storage_of(model, owners, storage, tables)
            if wanted != "dense" and not isinstance(weight, QuantizedTensor):
                quantized = nn.Parameter(quantize(weight, wanted), requires_grad=False)
                for owner in owners:
                    owner.weight = quantized
    return model


def _check(storage: str, tables: str | None) -> None:
    known = ("dense", *STORAGES) if tables is not None else STORAGES
    for name, value in (("storage", storage), ("tables", storage if tables is None else tables)):
        if value not in known:
            raise InputError(f"quantize_model: {name} is {value!r}: expected {' or '.join(known)}")


def storage_of(model: nn.Module, owners: list[nn.Module], storage: str, tables: str | None) -> str:
    """Returns the storage of the weight that ``owners`` hold: ``tables`` for one of ``is_table``, if given."""
    return tables if tables is not None and is_table(model, owners) else storage


def storages_of(model: nn.Module) -> tuple[str, str]:
    """Returns the storages in which ``model`` holds matrices of its layers and its tables; "dense" where they are."""
    found = {False: "dense", True: "dense"}
    for owners in quantizable(model):
        weight: Any = owners[0].weight
        if isinstance(weight, QuantizedTensor):
            found[is_table(model, owners)] = weight.storage
    return found[False], found[True]


def is_table(model: nn.Module, owners: list[nn.Module]) -> bool:
    """Returns whether the weight that ``owners`` hold is one of token embeddings or of the output projection."""
    head = getattr(model, "lm_head", None)
    head = None if head is None else head_linear(head)
    return any(isinstance(owner, nn.Embedding) or owner is head for owner in owners)


def quantizable(model: nn.Module) -> list[list[nn.Module]]:
    """Returns, for each weight that can be quantized, the modules that hold it."""
    exchanged = {key for record in records(model).values() for key in record.base}
    owners: dict[int, list[nn.Module]] = {}
    refused = set()
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
            frozen = not parameter.requires_grad and f"{path}.{name}" not in exchanged
            if not (frozen and name == "weight" and _holds_a_matrix(path, module)):
                refused.add(id(parameter))
    return [modules for key, modules in owners.items() if key not in refused]


def _holds_a_matrix(path: str, module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear layer or an embedding of tokens."""
    if isinstance(module, nn.Embedding):
        name = f"{type(module).__name__} {path.rpartition('.')[2]}".lower()
        return "position" not in name and "relative" not in name
    return isinstance(module, nn.Linear)
