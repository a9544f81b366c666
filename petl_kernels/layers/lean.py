"""Lean layers in the place of a model's own: which ones, in which tier, and why some are not.

A layer keeps its module, parameters, hooks and paths. Only its class changes: to one of the same name with a lean
``forward`` before the layer's own, which still runs for generation with a cache and wherever else the lean one cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from petl_kernels import versions
from petl_kernels.errors import InputError, shown
from petl_kernels.layers.bart import LeanBartLayer
from petl_kernels.layers.recompute import checkpointed, forget
from petl_kernels.layers.t5 import LeanT5Layer
from petl_kernels.layers.wide_ffn import WideFFN, bottleneck_beside
from petl_kernels.methods.structure import Layer, Structure, describe
from petl_kernels.transformers_names import attention_implementation, cache_in

TIERS = (1, 2, 3, 4, 5)
FAMILIES = {"bart": LeanBartLayer, "t5": LeanT5Layer}
# Attention functions of transformers whose masks the lean attention reads, also with a prefix.
ATTENTIONS = ("eager", "sdpa", "petl_prefix_eager", "petl_prefix_sdpa")


@dataclass(frozen=True)
class LayerState:
    """``tier`` is 0 for a layer that is as it was; ``reason`` says why, where it cannot be lean."""

    path: str
    tier: int
    reason: str


class LeanLayer:
    """What the lean layers of both families share."""

    petl_tier: int
    petl_wide: WideFFN | None = None

    def _apply(self, fn, recurse=True):
        """``to``, ``half`` and the like take each parameter apart from the others."""
        super()._apply(fn, recurse)
        if self.petl_wide is not None:
            self.petl_wide = self.petl_wide.moved()
        return self

    def run(self, x: Tensor, *inputs) -> Tensor:
        tier = self.petl_tier if torch.is_grad_enabled() else 0
        if tier < 4:
            y = self.body(x, *inputs, tier)
        else:
            y = checkpointed(partial(_whole, self), x, *inputs, offload=tier == 5)
        forget()
        return y

    def steps_aside(self, kwargs: dict) -> bool:
        """Whether the layer's own forward runs: with a cache, or when something wants to see what a lean one skips."""
        return cache_in(kwargs) is not None or bool(kwargs.get("output_attentions")) or bool(_obstacle(self))

    def __reduce_ex__(self, protocol):
        mixin, original = type(self).petl_bases
        return _bare, (mixin, original), self.__dict__


def _whole(layer: LeanLayer, x: Tensor, *inputs) -> Tensor:
    return layer.body(x, *inputs, 0)


def lean_layers(model: nn.Module, tier: int | Sequence[int]) -> None:
    """Make the layers of ``model`` lean, in place; see ``petl_kernels.lean``."""
    versions.check("transformers")
    try:
        structure = describe(model)
    except InputError:
        _tiers(tier, 0)
        return
    for layer, chosen in zip(structure.layers, _tiers(tier, len(structure.layers)), strict=True):
        module = model.get_submodule(layer.path)
        original = getattr(type(module), "petl_bases", (None, type(module)))[1]
        if chosen == 0 or _reason(model, structure, layer):
            narrow(module)
            module.__class__ = original
            continue
        module.__class__ = _lean_class(FAMILIES[structure.family], original)
        module.petl_tier, module.petl_pre_norm = chosen, structure.pre_norm
    widen(model)


def widen(model: nn.Module) -> None:
    """Give lean layers room for the parallel adapter that is active, in the weights of their feed-forward networks.

    Streamed layers have none: their weights' memory is not theirs. Where the adapter has gone, so does its room.
    """
    lean = {path: module for path, module in model.named_modules() if isinstance(module, LeanLayer)}
    if not lean:
        return
    streamed = getattr(model, "petl_streamed", None)
    for layer in describe(model).layers:
        module = lean.get(layer.path)
        if module is None or (streamed is not None and layer.path in streamed.paths):
            continue
        linears = [model.get_submodule(path) for path in layer.ffn.linears]
        if not bottleneck_beside(model, layer):
            narrow(module)
            continue
        modules = *linears, linears[-1].petl.current()
        if module.petl_wide is None or not module.petl_wide.serves(*modules):
            module.petl_wide = WideFFN(*modules)


def narrow(layer: nn.Module) -> None:
    """Undo ``widen`` for one layer."""
    if getattr(layer, "petl_wide", None) is not None:
        layer.petl_wide.undo()
        layer.petl_wide = None


def layer_states(model: nn.Module) -> list[LayerState]:
    """One entry a layer, encoder first; empty for a model of another kind."""
    try:
        structure = describe(model)
    except InputError:
        return []
    return [_state(model, structure, layer) for layer in structure.layers]


def _state(model: nn.Module, structure: Structure, layer: Layer) -> LayerState:
    module = model.get_submodule(layer.path)
    if not isinstance(module, LeanLayer):
        return LayerState(layer.path, 0, _reason(model, structure, layer))
    obstacle = _obstacle(module)
    return LayerState(layer.path, 0 if obstacle else module.petl_tier, obstacle)


def _tiers(tier: int | Sequence[int], layers: int) -> list[int]:
    single = isinstance(tier, (int, str)) or not isinstance(tier, Sequence)
    tiers = [tier] * layers if single else list(tier)
    for value in [tier] if single else tiers:
        if isinstance(value, bool) or not isinstance(value, int) or value not in (0, *TIERS):
            raise InputError(f"tier {shown(value)}: expected 1 to 5, 0 for the plain layer, or 'auto'")
    if layers and len(tiers) != layers:
        raise InputError(f"tier: {len(tiers)} of them, expected one for each of the {layers} layers, encoder first")
    return tiers


@functools.cache
def _lean_class(mixin: type, original: type) -> type:
    # the name stays: transformers and accelerate know layers by the names of their classes
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (LeanLayer, mixin, original), {**members, "petl_bases": (mixin, original)})


def _bare(mixin: type, original: type) -> nn.Module:
    cls = _lean_class(mixin, original)
    return cls.__new__(cls)


# ---- what cannot be lean --------------------------------------------------------------------------------------------


def _reason(model: nn.Module, structure: Structure, layer: Layer) -> str:
    """Why this layer of a known family cannot be lean, from how it is built."""
    module = model.get_submodule(layer.path)
    for path in (*(attention.norm for attention in layer.attentions), layer.ffn.norm):
        norm = model.get_submodule(path)
        if not isinstance(norm, nn.LayerNorm) and not hasattr(norm, "variance_epsilon"):
            return f"norm {type(norm).__name__}, expected a LayerNorm or RMSNorm"
    return FAMILIES[structure.family].uncovered(module)


def _obstacle(layer: LeanLayer) -> str:
    """What about the layer now lets its own forward run; empty when nothing does."""
    for name, module in _skipped(layer):
        config = getattr(module, "config", None)
        if config is not None and attention_implementation(config) not in ATTENTIONS:
            return f"attention implementation {attention_implementation(config)!r}, expected eager or sdpa"
        if _foreign_hooks(module):
            return f"a hook on {name}"
    return ""


def _skipped(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that a lean layer reads, but does not call."""
    for name, module in layer.named_children():
        if isinstance(module, nn.ModuleList):  # T5
            for part in module:
                yield type(part).__name__, part
                yield from part.named_children()
        elif not isinstance(module, nn.Linear) and name != "petl":
            yield name, module


def _foreign_hooks(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    known = ("petl_kernels.", "transformers.")  # transformers': they record attentions, when asked to
    return any(not getattr(hook, "__module__", "").startswith(known) for hook in hooks)
