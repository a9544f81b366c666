"""Hooks on modules, which the lean forward of a layer must not pass over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ON_ALL = [getattr(nn.modules.module, f"_global{kind}") for kind in _KINDS]


def hooks_on(module: nn.Module) -> list[Callable]:
    """Returns the hooks of ``module`` itself, forward and backward."""
    own = module.__dict__
    return [hook for kind in _KINDS if own[kind] for hook in own[kind].values()]


def is_foreign(hook: Callable) -> bool:
    """Returns whether ``hook`` is neither of this package nor of transformers."""
    known = ("petl_kernels.", "transformers.")  # those of transformers record attentions, for ``output_attentions``
    own = hook.func if isinstance(hook, partial) else hook
    return not getattr(own, "__module__", "").startswith(known)


def hooked_all() -> bool:
    """Returns whether a hook is on all modules."""
    return any(_ON_ALL)
