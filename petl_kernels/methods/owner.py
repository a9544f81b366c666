"""``model.petl``: everything that petl_kernels keeps of a model beside its tensors, in one object.

A plain model has none. The object is no part of the model's state; a deep copy and a pickle of the model take it along.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from petl_kernels.errors import InputError, shown
from petl_kernels.methods.base import Method
from petl_kernels.methods.pieces import Named
from petl_kernels.models.added import AddedParameters


@dataclass
class Record:
    """One adapter of a model.

    base: name -> value, on the CPU, of each base tensor that it trains: the base's while it is active, else its own.
    added: name -> parameter that the plain model lacks (biases for T5), in the model only while it is active.
    unmerged: name -> the parameter that ``merge`` has replaced; None while it is not merged.
    merge_error: the largest ‖Ŵ - W‖ / ‖W‖ of quantized weights Ŵ that should be W; None where none was merged into.
    was_tied: config.tie_word_embeddings was true before ``merge`` cleared it.
    """

    config: Method
    base: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, nn.Parameter] = field(default_factory=dict)
    unmerged: dict[str, nn.Parameter] | None = None
    merge_error: float | None = None
    was_tied: bool = False

    @property
    def merged(self) -> bool:
        return self.unmerged is not None


@dataclass(eq=False)
class Owner(AddedParameters):
    """The object in ``model.petl``.

    adapters: name -> record. active: the name of the adapter that runs and trains; None is the plain base.
    base_only: the model's ``state_dict`` leaves adapters out and its loading does not miss them.
    streamed: its layers that live elsewhere (``weights.streamed.Streamed``), if any do.
    sources: where a skeleton's parameters and buffers come from, see ``interop.hf.load_skeleton``.
    """

    adapters: dict[str, Record] = field(default_factory=dict)
    active: str | None = None
    base_only: bool = False
    streamed: Any = None
    sources: dict[str, str | Tensor] | None = None

    @property
    def added(self) -> set[str]:
        return {name for record in self.adapters.values() for name in record.added}


def owner(model: nn.Module) -> Owner:
    """Returns ``model.petl``, to be read; an empty one, which is not kept, for a plain model."""
    found = getattr(model, "petl", None)
    return found if isinstance(found, Owner) else Owner()


def own(model: nn.Module) -> Owner:
    """Returns ``model.petl``, to be written; makes it for a model that was plain."""
    found = getattr(model, "petl", None)
    if not isinstance(found, Owner):
        found = model.petl = Owner()  # pyright: ignore[reportArgumentType]  # a module takes any attribute
    return found


def records(model: nn.Module) -> dict[str, Record]:
    """Returns the adapters of ``model`` by name."""
    return owner(model).adapters


def active_name(model: nn.Module) -> str | None:
    """Returns the name of the adapter that ``model`` runs and trains; None for the plain base."""
    return owner(model).active


def find_record(model: nn.Module, name: str) -> Record:
    """Returns the adapter ``name``. Raises InputError with near names where there is none."""
    known = records(model)
    if not isinstance(name, str):
        raise InputError(f"adapter name {shown(name)}: expected a name")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or list(known)
        raise InputError(f"adapter {name!r}: not on this model, which has {', '.join(near) or 'none'}")
    return known[name]


def adapter_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters in ``model`` that the plain model lacks."""
    places = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Named))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(places)}
    return names | owner(model).added
