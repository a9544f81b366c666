"""The reasons why a model computes its loss from logits.

Each function here returns a reason in words, and "" where there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from petl_kernels.layers.hooks import hooked_all, hooks_on
from petl_kernels.models.transformers_names import forward_owner, head_linear, knows_loss


def class_obstacle(module: nn.Module) -> str:
    """Returns why models of the class of ``module`` keep their own loss."""
    if "lm_head" not in module._modules:  # a wrapper may pass on its model's
        return "no lm_head"
    return "" if knows_loss(type(module)) else f"{forward_owner(type(module)).__name__} has a forward of its own"


def head_obstacle(head: nn.Module | None) -> str:
    """Returns why the loss needs the product of ``head``, an output projection."""
    linear: Any = None if head is None else head_linear(head)
    modules: tuple[Any, ...] = head, linear
    name = "lm_head" if linear is head else "lm_head.out_proj"
    if type(linear) is not nn.Linear or linear.bias is not None:
        return f"{name} is a {type(linear).__name__}{' with a bias' if type(linear) is nn.Linear else ''}"
    for module in modules:
        if "forward" in vars(module):
            return "the forward of lm_head is replaced"
        if hooks_on(module):
            return "a hook on lm_head"
    return "a hook on lm_head" if hooked_all() else ""


def replaced_forward(model: nn.Module) -> str:
    """Returns what has replaced the forward of ``model`` and does not call that of its class."""
    own = vars(model).get("forward")
    if own is None or _leads_to(own, type(model).forward):
        return ""
    return f"forward of the {type(model).__name__} is replaced by {getattr(own, '__qualname__', type(own).__name__)}"


def _leads_to(function: Any, target: Callable) -> bool:
    """Returns whether ``function`` wraps ``target``, as decorators, bound methods, partial calls and closures do."""
    waiting, seen = [function], set()
    while waiting:
        function = waiting.pop()
        if function is target:
            return True
        if callable(function) and id(function) not in seen:
            seen.add(id(function))
            waiting += [getattr(function, name, None) for name in ("__wrapped__", "__func__", "func")]
            waiting += inspect.getclosurevars(function).nonlocals.values() if inspect.isfunction(function) else ()
    return False
