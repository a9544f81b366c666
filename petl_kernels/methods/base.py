"""``Method``: the config of a fine-tuning method, and all that the package has to know about it.

A method is one file beside this one with one subclass, see CONTRIBUTING.md. It changes a model in two ways:

- It injects *pieces*, small modules beside the model's own (``methods/pieces.py``).
- It trains *base tensors*, or tensors that it adds to modules which lack them (``methods/switch.py``).

Each adapter, which is a named use of a method, has both undone when another is active.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.methods.budget import budget_parameters, check_reached, largest_that_fits
from petl_kernels.methods.pieces import pieces


@dataclass(frozen=True)
class Method:
    """A fine-tuning method; its fields are its settings, each made by ``setting``.

    method: its key in ``METHODS`` and in files. trains: what it trains, in a few words.
    learning_rate: the peak for a model of width 1,024, where full fine-tuning needs 3e-5 (fairseq's mBART recipe). What
        starts at zero beside a frozen base needs 10 to 30 times that, single vectors and prefixes more still. Adam's
        best rate falls with the width, so ``petl-mt train`` multiplies it by 1024 / width.
    variants: further keys in ``METHODS`` -> (the settings that such a key stands for, what it trains).
    cannot_merge: why no weight can hold it; empty for methods that can be merged.
    size_field: the field that a parameter budget solves. ops: the ops that serve it.
    peft_type: Hugging Face PEFT's type, for methods that ``interop/peft_format.py`` reads and writes; the files of the
        others are in our own format.
    """

    method: ClassVar[str]
    trains: ClassVar[str]
    learning_rate: ClassVar[float] = 5e-4
    variants: ClassVar[dict[str, tuple[dict[str, Any], str]]] = {}
    cannot_merge: ClassVar[str] = ""
    size_field: ClassVar[str | None] = None
    ops: ClassVar[tuple[str, ...]] = ()
    peft_type: ClassVar[str | None] = None

    @property
    def label(self) -> str:
        """The key in ``METHODS`` that has these settings."""
        for name, (settings, _) in self.variants.items():
            if all(getattr(self, field) == value for field, value in settings.items()):
                return name
        return self.method

    def inject(self, model: nn.Module, name: str) -> None:
        """Adds its pieces to ``model`` under ``name``. Raises InputError before anything is changed."""

    def base_tensors(self, model: nn.Module) -> list[str]:
        """Returns the names of the base tensors that it trains."""
        return []

    def added_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns name -> initial value of the tensors that it adds to modules which lack them."""
        return {}

    def count(self, model: nn.Module) -> int:
        """Returns the number of parameters that it stores for ``model``, which stays as it is.

        A method that injects pieces or adds tensors counts those itself.
        """
        return sum(model.get_parameter(name).numel() for name in self.base_tensors(model))

    def computes(self, model: nn.Module) -> dict[str, object]:
        """Returns all that it computes with beside its tensors: what -> value. Adapters in which these are equal, and
        the tensors, compute the same."""
        return self.to_dict()

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        """Returns (name, values) of base tensors with the adapter ``name`` inside, one made after the other.

        Values are dense, in fp32 or wider. Raises InputError, before the first, where no weight can hold it. A method
        without pieces has nothing to merge.
        """
        if self.cannot_merge or any(pieces(model, name)):
            reason = self.cannot_merge or f"{self.label} has pieces and no merged_weights"
            raise InputError(f"adapter {name!r}: {reason}")
        return iter(())

    @classmethod
    def sized(cls, size: int, **fixed) -> Method:
        """Returns the method with its size set, for ``for_budget``."""
        assert cls.size_field is not None
        return cls(**{cls.size_field: size}, **fixed)

    @classmethod
    def largest_size(cls, model: nn.Module, **fixed) -> int | None:
        """Returns the largest value of the size field that ``model`` allows; None for no bound."""
        return None

    @classmethod
    def for_budget(cls, model: nn.Module, budget: float | int | str, **fixed) -> Method:
        """Returns the method with the largest size whose parameters fit ``budget`` of ``model``.

        budget: a share of the model's parameters in (0, 1] or as "10%", or a number of parameters, 2_000_000 or "2M".
        fixed: settings that are given. Raises InputError for a budget that the method cannot reach, with the nearest.
        """
        limit = budget_parameters(model, budget)
        if cls.size_field is None:
            config, size = cls(**fixed), ""
        elif cls.size_field in fixed:
            given = fixed[cls.size_field]
            raise InputError(f"{cls.method} {cls.size_field} {given}: a parameter budget sets it, give one")
        else:
            largest = cls.largest_size(model, **fixed)
            value = largest_that_fits(lambda size: cls.sized(size, **fixed).count(model) <= limit, largest)
            config, size = cls.sized(value, **fixed), f" ({cls.size_field} {value})"
        check_reached(model, budget, limit, config.count(model), config.label, size)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns {"method": ..., field: value, ...}, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return {"method": self.method, **plain}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Method:
        """Returns the config of ``fields``, as in JSON. Raises InputError that names the first unknown one."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3) or sorted(known) or ["none"]
                raise InputError(f"method {cls.method}: unknown setting {key!r}, expected {', '.join(near)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def setting(default: Any, meaning: str) -> Any:
    """Returns the dataclass field of one setting. meaning: a few words for ``petl-mt methods``."""
    value: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**value, metadata={"meaning": meaning})


def check_size(method: str, name: str, value: int) -> None:
    """Raises InputError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{method} {name} {value!r}: expected a whole number of at least 1")
