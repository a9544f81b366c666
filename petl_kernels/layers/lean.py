"""Lean layers in a model: which layers become lean, at which tier, and why some do not.

A layer stays the same module, with its parameters, hooks and path. Only its class changes, to one of the same name with
a lean ``forward`` before the layer's own. That still runs for generation with a cache, and where there is an obstacle:
a hook or a change on a module that the lean one does not call, say. ``layer_states`` returns what runs now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petl_kernels import versions
from petl_kernels.errors import InputError, shown
from petl_kernels.layers.families import family_for
from petl_kernels.layers.lean_layer import LeanLayer, make_lean, make_plain
from petl_kernels.layers.obstacles import obstacle, reason_of_build, replaced_forward
from petl_kernels.layers.wide_ffn import bottleneck_beside
from petl_kernels.methods.owner import owner
from petl_kernels.methods.switch import after_switch
from petl_kernels.models.structure import Layer, Structure, describe

TIERS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class LayerState:
    """``tier`` is 0 for a layer that is as it was; ``reason`` says why, where it cannot be lean.

    ``composed`` says why a lean layer runs op by op, where it has no rule of its own; empty where it has. ``own`` is
    what of a lean layer runs as the model's own; empty where nothing does.
    """

    path: str
    tier: int
    reason: str
    composed: str = ""
    own: str = ""


def lean_layers(model: nn.Module, tier: int | Sequence[int]) -> None:
    """Makes the layers of ``model`` lean, in place; see ``petl_kernels.lean``."""
    versions.check("transformers")
    try:
        structure = describe(model)
    except InputError:
        _tiers(tier, 0)
        return
    for layer, chosen in zip(structure.layers, _tiers(tier, len(structure.layers)), strict=True):
        module = model.get_submodule(layer.path)
        if chosen == 0 or reason_of_build(structure.family, module):
            make_plain(module)
            continue
        make_lean(module, family_for(structure.family, type(module)), chosen, layer.path, structure.pre_norm)
    widen(model)


def widen(model: nn.Module) -> None:
    """Gives the weights of lean layers room for the active adapter: those of the feed-forward network for a parallel
    one, those of q, k and v for LoRA. Call it when another adapter is active, or the weights have changed.

    The layers of a streamed model that live elsewhere get none, since their weights' memory is not theirs. Without a
    parallel adapter the feed-forward network has no room.
    """
    lean = {path: module for path, module in model.named_modules() if isinstance(module, LeanLayer)}
    if not lean:
        return
    streamed = owner(model).streamed
    for layer in describe(model).layers:
        module = lean.get(layer.path)
        if module is None or (streamed is not None and layer.path in streamed.paths):
            continue
        state = module.petl_lean
        state.borders = {} if state.borders is None else state.borders
        module.renew_borders()
        if not bottleneck_beside(model, layer):
            state.narrow_ffn()
            continue
        first: Any = model.get_submodule(layer.ffn.linears[0])
        out: Any = model.get_submodule(layer.ffn.linears[-1])
        state.widen(first, out, out.petl.current())


after_switch(widen)


def narrow(layer: nn.Module) -> None:
    """Undoes ``widen`` for one layer; leaves one that is not lean as it is."""
    if isinstance(layer, LeanLayer):
        layer.petl_lean.narrow()


def layer_states(model: nn.Module) -> list[LayerState]:
    """Returns one entry a layer, encoder first; one for the whole model where it is of another kind."""
    try:
        structure = describe(model)
    except InputError as error:
        name = type(model).__name__
        return [LayerState(name, 0, str(error).removeprefix(f"model {name}: "))]
    return [_state(model, structure, layer) for layer in structure.layers]


def _state(model: nn.Module, structure: Structure, layer: Layer) -> LayerState:
    module = model.get_submodule(layer.path)
    if not isinstance(module, LeanLayer):
        return LayerState(layer.path, 0, reason_of_build(structure.family, module))
    reason = replaced_forward(module) or obstacle(module)
    if reason:
        return LayerState(layer.path, 0, reason)
    q: Any = model.get_submodule(layer.attentions[0].q)
    rule = module.bound().found(module, torch.empty(0, dtype=q.weight.dtype), len(layer.attentions) > 1)
    own = "" if layer.ffn.inputs else "a feed-forward network of experts"
    return LayerState(layer.path, module.petl_lean.tier, "", rule if isinstance(rule, str) else "", own)


def _tiers(tier: Any, layers: int) -> list[int]:
    """Returns the tier of each layer. Raises InputError for what is no tier, or for another number of them."""
    single = isinstance(tier, (int, str)) or not isinstance(tier, Sequence)
    given: Any = [tier] if single else tier
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int) or value not in (0, *TIERS):
            raise InputError(f"tier {shown(value)}: expected 1 to 5, 0 for the plain layer, or 'auto'")
    tiers: list[int] = given * layers if single else list(given)
    if layers and len(tiers) != layers:
        raise InputError(f"tier: {len(tiers)} of them, expected one for each of the {layers} layers, encoder first")
    return tiers
