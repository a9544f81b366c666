"""The reasons why a layer is not lean, or why its own forward runs in the place of the lean one.

Each function here returns a reason in words, and "" where there is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petl_kernels.layers.blocks import ExpertsBlock
from petl_kernels.layers.families import family_for
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.hooks import hooked_all, hooks_on, is_foreign
from petl_kernels.layers.mixed_in import original_class
from petl_kernels.layers.pieces import active_piece
from petl_kernels.methods.prefix import Prefix
from petl_kernels.models.transformers_names import attention_implementation, class_of, class_that_runs
from petl_kernels.ops.philox import RATES, has_mask


def reason_of_build(family: str, module: nn.Module) -> str:
    """Returns why a layer of ``family`` cannot be lean, from how it is built."""
    known = family_for(family, type(module))
    return known.uncovered(module) or _unknown_forward(known, type(module))


def obstacle(layer: nn.Module) -> str:
    """Returns what about the lean ``layer`` lets its own forward run now."""
    family = family_of(layer)
    if hooked_all():
        return "a hook on all modules"
    return (
        _unknown_forward(family, type(layer))
        or _changed_part(family, layer)
        or _watched(layer, set(family.called(layer)))
        or _piece_elsewhere(layer)
        or next((f"dropout {rate}, expected less than 1" for rate in family.rates(layer) if rate >= 1), "")
        or next((f"dropout {rate}, expected {RATES}" for rate in family.rates(layer) if not has_mask(rate)), "")
    )


@torch.compiler.assume_constant_result
def obstacle_of_graph(layer: nn.Module) -> str:
    """Returns the obstacle when a graph is made: as with PyTorch's own calls, later hooks are not in it."""
    return obstacle(layer)


def replaced_forward(layer: nn.Module) -> str:
    """Returns why a call of ``layer`` does not reach its lean forward."""
    if "forward" not in layer.__dict__:
        return ""
    wrapped = getattr(layer, "_old_forward", None)  # accelerate's hooks: they came after, and call it
    return "" if getattr(wrapped, "__func__", None) is type(layer).forward else "another forward is in its place"


def family_of(layer: Any) -> type[Family]:
    """Returns the class of the family that is mixed into the lean ``layer``."""
    return type(layer).petl_bases[1]


def _unknown_forward(family: type[Family], cls: type) -> str:
    """Returns why no lean layer of ``family`` stands for the ``forward`` of the class without mixins."""
    original = original_class(cls)
    if class_of(original.forward) in family.known:
        return ""
    return f"{original.__name__} has a forward of its own, which no lean layer stands for"


def _changed_part(family: type[Family], layer: nn.Module) -> str:
    """Returns which module that the lean forward does not call is of another class than it takes it for."""
    for name, part, classes in family.parts(layer):
        if class_that_runs(part) not in classes:
            what = type(part).__name__
            return f"{name} is a {what}{' with another forward' if what in classes else ''}"
        if hasattr(part, "weight") and part._parameters.get("weight") is None:
            return f"{name} has no weight of its own"
        config = getattr(part, "config", None)
        if config is not None and attention_implementation(config) not in family.functions:
            expected = " or ".join(name for name in family.functions if not name.startswith("petl"))
            return f"attention implementation {attention_implementation(config)!r}, expected {expected}"
    return ""


def _piece_elsewhere(layer: Any) -> str:
    """Returns which active piece stands where the lean forward runs none: on no linear, norm or layer."""
    attentions, ffn = layer.blocks(True)
    norms = {block.norm for block in (*attentions, ffn)}
    linears = {linear for block in attentions for linear in (block.q, block.k, block.v, block.out)}
    called = {inner for module in family_of(layer).called(layer) for inner in module.modules()}
    behind = {block.post for block in (*attentions, ffn) if getattr(block, "post", None) is not None}
    hosts = {layer, *norms, *behind, *linears, *called}
    if not isinstance(ffn, ExpertsBlock):
        hosts |= {*ffn.inputs, ffn.out}
    attended = {block.host for block in attentions}
    for path, module in layer.named_modules():
        piece = active_piece(module)
        if piece is None or module in hosts or (module in attended and isinstance(piece, Prefix)):
            continue
        return f"a {type(piece).__name__} on {path}, where lean layers run none"
    return ""


def _watched(module: nn.Module, called: set[nn.Module], path: str = "") -> str:
    """Returns which module inside of ``module`` has a hook, another forward or a parametrization.

    called: the modules that the lean forward calls, with all that is inside.
    """
    for name, part in module._modules.items():
        if part is None or part in called:
            continue
        own = part.__dict__
        if any(map(is_foreign, hooks_on(part))):
            return f"a hook on {path}{name}"
        if "forward" in own:
            return f"{path}{name} is a {type(part).__name__} with another forward"
        if "parametrizations" in part._modules:
            return f"a parametrization of {path}{name}"
        found = _watched(part, called, f"{path}{name}.") if part._modules else ""
        if found:
            return found
    return ""
