"""PEFT's adapters on a model that has adapters already: refused, since PEFT's files would leave those out.

What PEFT saves, and transformers' ``Trainer`` for it, are PEFT's own tensors. Read again, they would stand on a base
without the other adapter, and compute something else. A merged adapter is in the weights, and is no obstacle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import records

# Classes that get a model first, whichever adapter of PEFT it is for. Where PEFT renames them, nothing is refused.
_CLASSES = ("BaseTuner", "PeftModel")


def wrap(module: ModuleType) -> None:
    """Wraps the constructors that one of PEFT's modules defines, in place."""
    for name in _CLASSES:
        cls = getattr(module, name, None)
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            cls.__init__ = _checked(cls.__init__)


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, model, *args, **kwargs):
        _refuse_adapted(model)
        original(self, model, *args, **kwargs)

    return __init__


def _refuse_adapted(model: object) -> None:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for name, record in records(module).items():
            if not record.merged:
                raise InputError(
                    f"PEFT on a model that has the adapter {name!r}: PEFT's files would leave it out, expected the "
                    "plain model, or one that it is merged into (pk.merge)"
                )
