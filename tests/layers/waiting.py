"""Calls that let the host wait for a device: reads of a tensor's values, or of how many of them there are."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")
FUNCTIONS = ("nonzero", "unique", "masked_select", "equal", "is_nonzero")
OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal")


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yields a list that gets each such call in the block, of Python (in custom ops too) or of PyTorch's ops."""
    found: list[str] = []
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, _recording(getattr(Tensor, name), name, found)))
        for name in FUNCTIONS:
            stack.enter_context(mock.patch.object(torch, name, _recording(getattr(torch, name), name, found)))
        indexed = _recording(Tensor.__getitem__, "boolean index", found, only=_has_boolean_index)
        stack.enter_context(mock.patch.object(Tensor, "__getitem__", indexed))
        stack.enter_context(_Ops(found))
        yield found


def _recording(function, name: str, found: list[str], only=lambda *_: True):
    def recorded(*args, **kwargs):
        if only(*args):
            found.append(f"{name}: {_caller()}")
        return function(*args, **kwargs)

    return recorded


def _has_boolean_index(_, index) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _caller() -> str:
    stack = traceback.StackSummary.extract(traceback.walk_stack(None), limit=12, lookup_lines=False)
    between = ("waiting.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py")
    frames = [frame for frame in stack if not frame.filename.endswith(between)]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}:{frame.name}" for frame in frames[:5])


class _Ops(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        if name in OPS:
            self._found.append(f"{name}: {_caller()}")
        return function(*args, **(kwargs or {}))
