"""What every fine-tuning method shares: its config, what it puts into a model, switching, and its state.

A method changes a model in two ways, and each adapter (a named use of a method) has both undone when another is active:

- *Pieces*: small modules beside the model's own, one a place, held by name in a ``Named``. The place keeps its path and
  its parameters' names, so the plain model's state keys stay what they were.
- *Base tensors* that are trained themselves. While the adapter is active the model holds its values and the record the
  base's, else the other way round; ``exchange`` swaps them, so both come back bit for bit.

State contract with ``petl_kernels.interop``: ``adapter_state`` and ``load_adapter_state`` use keys
"<module path in the plain model>.<suffix>", without the adapter's name and without any wrapper.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError, shown
from petl_kernels.methods.state_dicts import watch
from petl_kernels.ops.quantized import QuantizedTensor, quantize_like


class Named(nn.ModuleDict):
    """The pieces of one place in the model, by adapter name. At most one is active."""

    active: str | None = None

    def current(self) -> Piece | None:
        return None if self.active is None else self[self.active]


class Piece(nn.Module):
    """What one adapter puts into one place. A piece in ``host.petl`` sees what its host reads and writes."""

    what: str = ""  # its name in reports

    def before(self, host: nn.Module, args: tuple) -> tuple | None:
        """The host's arguments, changed; None to leave them."""
        return None

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The host's (first) output, changed."""
        return output

    def state(self) -> dict[str, Tensor]:
        """What is stored: suffix -> tensor."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """What is trained in place of ``state``: suffix -> parameter; empty where ``state`` is the parameters."""
        return {}

    def fold(self) -> None:
        """Make ``state`` return the parameters themselves; for pieces that train another form than they store."""


def attach(host: nn.Module, name: str, piece: Piece) -> None:
    """Put ``piece`` into ``host.petl`` under ``name``; the first one also hooks the host."""
    if not hasattr(host, "petl"):
        host.petl = Named()
        host.register_forward_pre_hook(_before)
        # prepended: what transformers records as a layer's output is then the adapted one
        host.register_forward_hook(_after, prepend=True)
    host.petl[name] = piece


# Functions of the module alone, not closures, so that a deep copy of the model runs its own pieces.
def _before(host: nn.Module, args: tuple):
    piece = host.petl.current()
    return None if piece is None else piece.before(host, args)


def _after(host: nn.Module, args: tuple, output):
    piece = host.petl.current()
    if piece is None:
        return None
    if isinstance(output, tuple):
        return (piece.after(host, args, output[0]), *output[1:])
    return piece.after(host, args, output)


@dataclass
class Record:
    """One adapter of a model, in ``model.petl_adapters``.

    base: name -> the values that the model does not hold now of the base tensors that it trains, on the CPU.
    added: name -> parameter that the plain model lacks (biases for T5), in the model only while active.
    unmerged: name -> the parameter that ``merge`` has replaced; None while not merged.
    merge_error: the largest ‖Ŵ - W‖ / ‖W‖ of quantized weights Ŵ that should be W; None where none was merged into.
    """

    config: Method
    base: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, nn.Parameter] = field(default_factory=dict)
    unmerged: dict[str, nn.Parameter] | None = None
    merge_error: float | None = None
    was_tied: bool = False  # the value of config.tie_word_embeddings before merge changed it

    @property
    def merged(self) -> bool:
        return self.unmerged is not None


@dataclass(frozen=True)
class Method:
    """A fine-tuning method and its settings. Subclasses stand one a file."""

    method: ClassVar[str]
    size_field: ClassVar[str | None] = None  # the field that a parameter budget solves
    ops: ClassVar[tuple[str, ...]] = ()  # the ops that serve it

    @property
    def label(self) -> str:
        """Its key in ``METHODS``."""
        return self.method

    def inject(self, model: nn.Module, name: str) -> None:
        """Add its pieces to ``model`` under ``name``. Raises InputError before anything is changed."""

    def base_tensors(self, model: nn.Module) -> list[str]:
        """Names of the base tensors that it trains."""
        return []

    def added_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> initial value of the tensors that it adds to modules which lack them."""
        return {}

    def count(self, model: nn.Module) -> int:
        """The number of parameters that it stores for ``model``, without changing the model."""
        raise NotImplementedError

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of base tensors with the adapter ``name`` inside, one made after the other; InputError, before
        the first, if it cannot. Values are dense, in a dtype of their own choice: see ``stored_as``."""
        return iter(())

    @classmethod
    def sized(cls, size: int, **fixed) -> Method:
        """The method with its size set, for ``for_budget``."""
        return cls(**{cls.size_field: size}, **fixed)

    @classmethod
    def largest_size(cls, model: nn.Module, **fixed) -> int | None:
        """The largest value of the size field that ``model`` allows; None for no bound."""
        return None

    @classmethod
    def for_budget(cls, model: nn.Module, budget: float | int | str, **fixed) -> Method:
        """The method with the largest size whose parameters fit ``budget`` of ``model``.

        budget: a share of the model's parameters in (0, 1] or as "10%", or a number of parameters, 2_000_000 or "2M".
        fixed: settings that are given. Raises InputError for a budget that the method cannot reach, with the nearest.
        """
        from petl_kernels.methods.budget import solve

        return solve(cls, model, budget, fixed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"method": ..., field: value, ...}."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return {"method": self.method, **plain}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Method:
        """The config from its fields, as in JSON; InputError names the first unknown one."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3) or sorted(known) or ["none"]
                raise InputError(f"method {cls.method}: unknown setting {key!r}, expected {', '.join(near)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def check_size(method: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{method} {name} {value!r}: expected a whole number of at least 1")


def piece_dtype(tensor: Tensor) -> torch.dtype:
    """New parameters are fp32 beside a 16-bit base: small updates would be lost in 16 bits."""
    return torch.promote_types(tensor.dtype, torch.float32)


# -- the adapters of a model ----------------------------------------------------------------------------------------


def records(model: nn.Module) -> dict[str, Record]:
    return getattr(model, "petl_adapters", {})


def active_name(model: nn.Module) -> str | None:
    return getattr(model, "petl_active", None)


def find_record(model: nn.Module, name: str) -> Record:
    known = records(model)
    if not isinstance(name, str):
        raise InputError(f"adapter name {shown(name)}: expected a name")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or list(known)
        raise InputError(f"adapter {name!r}: not on this model, which has {', '.join(near) or 'none'}")
    return known[name]


def pieces(model: nn.Module, name: str) -> Iterator[tuple[str, Piece]]:
    """(path of the place, piece) of the adapter ``name``."""
    for path, module in model.named_modules():
        if isinstance(module, Named) and name in module:
            yield path.rpartition(".")[0], module[name]


def add_record(model: nn.Module, config: Method, name: str) -> None:
    """Inject ``config`` into ``model``, no adapter of which is active, as the adapter ``name``."""
    record = Record(config)
    config.inject(model, name)
    trained = {key: model.get_parameter(key) for key in config.base_tensors(model)}
    for key, parameter in trained.items():
        refuse_quantized(f"{config.label}: it trains", key, parameter)
    record.base = {key: host_copy(parameter) for key, parameter in trained.items()}
    record.added = {key: nn.Parameter(value) for key, value in config.added_tensors(model).items()}
    model.petl_adapters = {**records(model), name: record}
    watch(model)
    _keep_out_of_checkpoints(model)


def refuse_quantized(what: str, key: str, parameter: Tensor) -> None:
    if isinstance(parameter, QuantizedTensor):
        raise InputError(f"{what} {key!r}, which is quantized ({parameter.storage}): expected a dense weight")


def wide_copy(weight: Tensor) -> Tensor:
    """The values of a base tensor in fp32 or wider, to be changed in place."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize(wide)
    return weight.detach().to(wide, copy=True)


def stored_as(weight: Tensor, values: Tensor) -> tuple[Tensor, float | None]:
    """``values`` held as ``weight`` is, and the relative error of rounding them where that is quantized."""
    if isinstance(weight, QuantizedTensor):
        return quantize_like(weight, values)
    return values.to(weight.dtype), None


def discard(model: nn.Module, name: str) -> None:
    """Take away the pieces of an adapter that could not be injected in full."""
    for module in list(model.modules()):
        if isinstance(module, Named) and name in module:
            del module[name]


def _keep_out_of_checkpoints(model: nn.Module) -> None:
    """``save_pretrained`` writes the plain model: adapters have files of their own."""
    if not hasattr(model, "_keys_to_ignore_on_save"):
        return
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *adapter_parameters(model)}


def adapter_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters in ``model`` that the plain model has not."""
    places = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Named))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(places)}
    return names.union(*(record.added for record in records(model).values()))


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory: what is set aside costs nothing on the device."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)


def activate(model: nn.Module, name: str | None) -> None:
    """Make ``name`` the adapter that the model runs and trains; None for the plain, frozen base."""
    current = active_name(model)
    if current is not None:
        record = records(model)[current]
        exchange(model, record)
        for key in record.added:
            set_parameter(model, key, None)
    model.petl_active = name
    model.requires_grad_(False)
    run_pieces(model, name)
    if name is None:
        return
    record = records(model)[name]
    exchange(model, record)
    for key, parameter in record.added.items():
        _follow(parameter, model.get_submodule(key.rpartition(".")[0]).weight)
        set_parameter(model, key, parameter)
    for parameter in trained(model, name):
        parameter.requires_grad_(True)


def _follow(added: nn.Parameter, weight: Tensor) -> None:
    """Device and dtype of the module's weight: ``model.to`` does not reach what is not in the model."""
    if (added.device, added.dtype) != (weight.device, weight.dtype):
        added.data = added.data.to(weight.device, weight.dtype)


def run_pieces(model: nn.Module, name: str | None) -> None:
    """Let every place run the piece of ``name``, if it has one."""
    for module in model.modules():
        if isinstance(module, Named):
            module.active = name if name is not None and name in module else None


def exchange(model: nn.Module, record: Record) -> None:
    """Swap the model's values of the record's base tensors with those that the record keeps."""
    with torch.no_grad():
        for key, other in record.base.items():
            parameter = model.get_parameter(key)
            record.base[key] = host_copy(parameter)
            parameter.copy_(other)


def trained(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that the active adapter ``name`` trains."""
    record = records(model)[name]
    own = [parameter for _, piece in pieces(model, name) for parameter in piece.parameters()]
    return [*own, *(model.get_parameter(key) for key in record.base), *record.added.values()]


def set_parameter(model: nn.Module, path: str, parameter: nn.Parameter | None) -> None:
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


# -- state ----------------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the adapter ``name`` stores: key -> detached tensor that shares memory with the model's where it can.

    A reparametrised prefix is stored folded.
    """
    record = find_record(model, name)
    state = {f"{path}.{suffix}": t for path, piece in pieces(model, name) for suffix, t in piece.state().items()}
    for key, kept in record.base.items():
        state[key] = model.get_parameter(key) if name == active_name(model) else kept
    state.update(record.added)
    return {key: tensor.detach() for key, tensor in state.items()}


def load_adapter_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Put ``state`` into the adapter ``name``; values are cast to the dtype that the model has for them.

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
    """What training ``name`` goes on from, where that is another form than ``adapter_state``; else empty."""
    return {
        f"{path}.{suffix}": t for path, piece in pieces(model, name) for suffix, t in piece.training_state().items()
    }


def load_training_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Put what ``training_state`` gave back. Raises InputError as ``load_adapter_state`` does."""
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
