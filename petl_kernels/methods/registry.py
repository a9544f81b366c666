"""``METHODS``: every method of this folder by the names that ``--method`` takes, found by its file."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method


@dataclass(frozen=True)
class Variant:
    """A method with some settings made: ``variant(bottleneck=64)`` or ``variant.for_budget(model, "10%")``.

    trains: what it trains, in a few words.
    """

    config: type[Method]
    settings: dict[str, Any]
    trains: str = ""

    def __call__(self, **fields) -> Method:
        return self.config.from_fields({**self.settings, **fields})

    def for_budget(self, model: nn.Module, budget: float | int | str, **fixed) -> Method:
        self(**fixed)  # refuses unknown settings
        return self.config.for_budget(model, budget, **{**self.settings, **fixed})


def _configs() -> dict[str, type[Method]]:
    """Returns the config class of each method's file in this folder, by the class's name, in the files' order."""
    package = __name__.rpartition(".")[0]
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{file.name}")
    return {cls.__name__: cls for cls in sorted(Method.__subclasses__(), key=lambda cls: cls.__module__)}


def _variants(configs: dict[str, type[Method]]) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for config in configs.values():
        for name, (settings, trains) in {config.method: ({}, config.trains), **config.variants}.items():
            if name in found:
                raise InputError(f"method {name!r}: of {found[name].config.__name__} and of {config.__name__}")
            found[name] = Variant(config, settings, trains)
    return found


CONFIGS = _configs()
METHODS = _variants(CONFIGS)


def from_dict(settings: dict[str, Any]) -> Method:
    """Returns the config that ``to_dict`` wrote. Raises InputError for an unknown method or setting."""
    fields = dict(settings)
    name = fields.pop("method", None)
    classes = {config.method: config for config in CONFIGS.values()}
    if name not in classes:
        near = difflib.get_close_matches(str(name), classes, n=3) or sorted(classes)
        raise InputError(f"method {name!r}: unknown, expected {', '.join(near)}")
    return classes[name].from_fields(fields)
