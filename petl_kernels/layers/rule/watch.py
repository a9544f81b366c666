"""The comparison of a layer with what its rule was made from.

All values that the layer and the modules inside hold are compared by identity: settings, parameters, submodules and
hooks; of parameters also the dtype, and whether they are trained. That takes microseconds, so it runs at every call.
What is slower, obstacles and the making of a rule, runs only where something has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from petl_kernels.extension import find_extension

_extension = find_extension()
if _extension is not None:
    same_values, stamps, values = _extension.same_values, _extension.stamps, _extension.values
else:  # a machine without a compiler

    def values(dictionaries: list[dict]) -> list:
        return list(chain.from_iterable([own.values() for own in dictionaries]))

    def same_values(dictionaries: list[dict], before: list) -> bool:
        now = values(dictionaries)
        return len(now) == len(before) and all(map(is_, now, before))

    def stamps(tensors: list[Tensor]) -> list[tuple[int, int]]:
        return [(0 if own.is_inference() else own._version, own.untyped_storage()._cdata) for own in tensors]


_DICTS = ("_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The state of ``layer`` at the time when this is made. called: modules inside that are called as they then are."""

    __slots__ = ("modules", "dicts", "classes", "parameters", "before", "kinds")

    def __init__(self, layer: nn.Module, called: Iterable[nn.Module] = ()):
        left = {inner for module in called for inner in module.modules()}
        self.modules = [module for module in layer.modules() if module not in left]
        self.dicts = list(_dicts(self.modules))
        self.classes = list({type(module) for module in self.modules})
        self.parameters = list(
            dict.fromkeys(own for module in self.modules for own in module.parameters(recurse=False))
        )
        self.before, self.kinds = values(self.dicts), self._kinds()

    def holds(self) -> bool:
        """Returns whether nothing has changed since."""
        return same_values(self.dicts, self.before) and self._kinds() == self.kinds

    def _kinds(self) -> list:
        """Returns what no dictionary holds: classes with their forward functions, and the state of parameters."""
        kinds = [*map(type, self.modules), *[cls.forward for cls in self.classes]]
        for parameter in self.parameters:
            kinds += parameter.requires_grad, parameter.dtype
        return kinds


def changed(name: str) -> RuntimeError:
    """Returns the error for a tensor whose values backward needs and no longer has."""
    return RuntimeError(
        f"{name}: changed since the forward pass, and backward reads it; expected no change between a forward pass and "
        "its backward pass"
    )


def _dicts(modules: list[Any]) -> Iterator[dict[str, Any]]:
    configs: dict[int, Any] = {
        id(config): config for module in modules if (config := module.__dict__.get("config")) is not None
    }
    for module in modules:
        own = module.__dict__
        yield own
        yield from (own[name] for name in _DICTS)
        yield from (parameter.__dict__ for parameter in module._parameters.values() if hasattr(parameter, "parts"))
    yield from (config.__dict__ for config in configs.values())
