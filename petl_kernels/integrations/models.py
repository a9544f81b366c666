"""``save_pretrained`` and ``resize_token_embeddings`` of a transformers model that has adapters.

``model.save_pretrained(folder)`` writes the plain model, with the base's values also where an adapter trains base
tensors, and beside it each adapter in a subfolder of its name. So ``from_pretrained(folder)`` is the plain model, and
``pk.load_adapter(model, folder)`` brings an adapter back. A merged model is written as the plain model that it is.

``resize_token_embeddings`` makes new tables in place of those that an adapter is on. Where that would leave an adapter,
or what a merge put into a table, behind, it is refused; adapters elsewhere stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.interop.adapters import write_adapters
from petl_kernels.interop.plain import plain_state, state_to_save, without_adapters
from petl_kernels.methods.owner import active_name, records
from petl_kernels.methods.pieces import Named
from petl_kernels.models.transformers_names import resized_embeddings
from petl_kernels.ops.quantized import QuantizedTensor


def wrap(modeling_utils: ModuleType) -> None:
    """Wraps the methods of ``PreTrainedModel``, in place."""
    cls = modeling_utils.PreTrainedModel
    cls.save_pretrained = _saving(cls.save_pretrained)
    cls.resize_token_embeddings = _resizing(cls.resize_token_embeddings)
    # Marian's separate decoder table has a method of its own, which ends there too
    name = resized_embeddings(cls)
    if name is not None:
        setattr(cls, name, _checked(getattr(cls, name)))


# -- save_pretrained ------------------------------------------------------------------------------------------------


def _saving(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        if (state := state_to_save(self)) is not None:
            arguments = signature.bind(self, *args, **kwargs).arguments
            return original(self, *args, **(kwargs if "state_dict" in arguments else {**kwargs, "state_dict": state}))
        if not records(self):
            return original(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})
        del arguments["self"]
        _check_saving(self, arguments)
        merged = _is_merged(self)
        arguments["state_dict"] = plain_state(self, arguments.get("state_dict"))
        # a quantizer of transformers makes a state of its own from the model
        with without_adapters(self) if getattr(self, "hf_quantizer", None) and not merged else nullcontext():
            result = original(self, **arguments, **extra)
        if not merged and arguments.get("is_main_process", True):
            write_adapters(self, arguments["save_directory"])
        return result

    return save_pretrained


def _check_saving(model: nn.Module, arguments: dict) -> None:
    for option in ("push_to_hub", "distributed_checkpoint"):
        if arguments.get(option):
            raise InputError(f"save_pretrained {option} True: it would leave the adapters out; save without it first")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InputError("save_pretrained: the model is spread over devices, expected a whole one to save adapters of")


def _is_merged(model: nn.Module) -> bool:
    """Returns whether the active adapter is in the weights. Warns of the others, whose base is another one then."""
    name = active_name(model)
    merged = name is not None and records(model)[name].merged
    others = [other for other in records(model) if other != name]
    if merged and others:
        warnings.warn(f"save_pretrained: {name!r} is merged and saved, {', '.join(others)} not: unmerge", stacklevel=4)
    return merged


# -- resize_token_embeddings ----------------------------------------------------------------------------------------


def _resizing(original: Callable) -> Callable:
    @functools.wraps(original)
    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs):
        obstacle = _concerns(self) and _obstacle(self, self.get_input_embeddings().weight.shape[0])
        if not obstacle:
            return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        table = self.get_input_embeddings()
        wanted = table.weight.shape[0] if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != table.weight.shape[0]:
            raise InputError(f"resize_token_embeddings to {wanted}: {obstacle}")
        return table  # of the size already: transformers would make one module of the tables, without their adapters

    return resize_token_embeddings


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_resized_embeddings(self, old_embeddings, new_num_tokens=None, *args, **kwargs):
        rows = old_embeddings.weight.shape[0]
        obstacle = _concerns(self) and _obstacle(self, rows)
        if obstacle and new_num_tokens not in (None, rows):
            raise InputError(f"resizing embeddings to {new_num_tokens}: {obstacle}")
        return original(self, old_embeddings, new_num_tokens, *args, **kwargs)

    return get_resized_embeddings


def _concerns(model: nn.Module) -> bool:
    return bool(records(model)) or any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())


def _obstacle(model: nn.Module, rows: int) -> str:
    """Returns why tables of ``rows`` tokens cannot be resized; empty where they can."""
    tables = dict(_tables(model, rows))
    tensors = {f"{path}.{kind}" for path in tables for kind in ("weight", "bias")}
    for path, table in tables.items():
        if isinstance(table.weight, QuantizedTensor):
            return f"{path!r} is quantized ({table.weight.storage}): resize the model before it is quantized"
    for name, record in records(model).items():
        merged = sorted(tensors.intersection(record.unmerged or ()))
        if merged:
            return f"adapter {name!r} is merged into {merged[0]!r}: save_pretrained, load that folder and resize it"
    for path, table in tables.items():
        names = [name for module in table.children() if isinstance(module, Named) for name in module]
        if names:
            return f"adapter {names[0]!r} is on {path!r}: resize the model before pk.adapt"
    for name, record in records(model).items():
        trained = sorted(tensors & _aliases(model, (*record.base, *record.added)))
        if trained:
            return f"adapter {name!r} trains {trained[0]!r}: resize the model before pk.adapt"
    return ""


def _tables(model: Any, rows: int) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) of the token embeddings and the output projection."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head or (isinstance(module, nn.Embedding) and module.weight.shape[0] == rows):
            yield path, module


def _aliases(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """Returns ``names`` of parameters and all other names that these have."""
    named = dict(model.named_parameters(remove_duplicate=False))
    meant = {id(named[name]) for name in names if name in named}
    return {name for name, parameter in named.items() if id(parameter) in meant} | set(names)
