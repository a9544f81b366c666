"""The state of modules in a forward pass, compared with their state when backward reads them again.

It has the parameters (by identity, memory and version), the adapter in use, and every plain setting: dropout rates,
scales, the mode of modules that drop anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from petl_kernels.methods.pieces import Named
from petl_kernels.ops.quantized import QuantizedTensor, parts_of

_PLAIN = (bool, int, float, str, type(None))
_PRIVATE = ("_active_adapter", "_disable_adapters")  # PEFT's
_LIBRARIES = ("torch.", "transformers.", "peft.", "petl_kernels.")


class Seen:
    """The state of ``modules`` and the modules inside.

    layer: the lean layer around them, for its path. graph: whether backward records their graph again, so that the same
    parameters have to require grad.
    """

    __slots__ = ("modules", "layer", "graph", "states")

    def __init__(self, modules: tuple[nn.Module, ...], layer: nn.Module | None = None, graph: bool = False):
        self.modules, self.layer, self.graph = modules, layer, graph
        self.states = [_state(part, graph) for module in modules for _, part in _parts(module)]

    def check(self) -> None:
        """Raises RuntimeError where a state has changed, and names the first change."""
        if [_state(part, self.graph) for module in self.modules for _, part in _parts(module)] != self.states:
            raise RuntimeError(
                f"{self._change()}: from tier 2 on backward computes it again, so nothing of it may change between the "
                "forward pass and its backward pass (pk.lean(model, 1) keeps more and allows it)"
            )

    def _change(self) -> str:
        now = [(path, _state(part, self.graph)) for module in self.modules for path, part in self._paths(module)]
        for (path, state), before in zip(now, self.states, strict=False):
            if state.keys() != before.keys():
                return f"{path}: other settings or parameters than the forward pass saw"
            for key, value in state.items():
                if value == before[key]:
                    continue
                if isinstance(value, tuple):
                    return f"{path}.{key}: changed since the forward pass"
                return f"{path}: {key} was {before[key]!r} in the forward pass and is {value!r} now"
        return f"{now[0][0]}: other modules than the forward pass saw"

    def _paths(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        root = next((path for path, other in _named(self.layer) if other is module), type(module).__name__)
        for path, part in _parts(module):
            yield f"{root}.{path}".strip("."), part


def _named(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    if layer is not None:
        start = layer.petl_lean.path if hasattr(layer, "petl_lean") else type(layer).__name__
        for path, module in layer.named_modules():
            yield f"{start}.{path}".rstrip("."), module


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields ``module`` and the modules inside by path, without adapters that are not in use."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not (isinstance(module, Named) and name != module.active):
            yield from _parts(child, f"{path}.{name}" if path else name)


def _state(module: nn.Module, graph: bool) -> dict[str, Any]:
    settings = {key: _plain(value) for key, value in module.__dict__.items() if key[0] != "_" or key in _PRIVATE}
    if not _heeds_mode(module, settings):
        del settings["training"]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            settings[name] = _values(parameter)
            if graph:
                settings[f"requires_grad of {name}"] = parameter.requires_grad
    return settings


def _values(parameter: Tensor) -> tuple:
    """Returns values that differ for another parameter, after a write to it, and for other memory by ``.data``.

    They have storages and not addresses: those of streamed weights change. A storage that is held here cannot be taken
    for a later one.
    """
    own = id(parameter), parameter._version
    if not isinstance(parameter, QuantizedTensor) and type(parameter) not in (nn.Parameter, Tensor):
        return own  # a tensor class of another library may have no storage
    places = ((part.untyped_storage(), part.storage_offset(), part.stride()) for part in parts_of(parameter))
    return *own, *places


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    return repr(value) if isinstance(value, (list, dict)) and len(value) < 9 else None


def _heeds_mode(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Returns whether train and eval may differ: for a module with dropout, buffers or a setting for evaluation alone
    (a router's), or of another library."""
    rates = (value for key, value in settings.items() if key == "p" or "dropout" in key or "_eval_" in key)
    if any(isinstance(rate, float) and rate > 0 for rate in rates) or module._buffers:
        return True
    return not type(module).__module__.startswith(_LIBRARIES)
