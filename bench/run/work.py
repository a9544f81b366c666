"""The things that are timed: a case in the bench's names, and a call with the leaves whose gradients it forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Names the case of a measurement; the names are those of bench/shapes.py and of the report."""

    op: str
    shape: str
    tokens: int
    dtype: str
    device: str
    case: str = ""
    rounds: int = 15

    @property
    def group(self) -> str:
        return " ".join(part for part in (self.op, self.shape, self.case, f"{self.tokens} tokens", self.dtype) if part)


@dataclass(frozen=True)
class Work:
    """Holds a call to be differentiated, and the leaves whose gradients a step forms (none: forward alone)."""

    forward: Callable[[], Tensor | Sequence[Tensor]]
    leaves: tuple[Tensor, ...] = ()


Inputs = tuple[Tensor | None, ...]
Prepare = Callable[..., Work]


def differentiated(function: Callable) -> Prepare:
    """Prepares ``function(*inputs)`` and the gradients of those inputs that require one."""

    def prepare(*inputs: Tensor | None) -> Work:
        return Work(lambda: function(*inputs), leaves_of(inputs))

    return prepare


def forward_only(function: Callable) -> Prepare:
    return lambda *inputs: Work(lambda: function(*inputs))


def passes(*arrays: int) -> Prepare:
    """Prepares a limit that moves bytes alone: for each number a pass over as many arrays of the first input's size.

    Two are a copy, three a sum, four two copies, five a sum and a copy. Into memory that stands: a limit has nothing to
    allocate.
    """

    def prepare(x: Tensor, *_: Tensor | None) -> Work:
        x = x.detach()
        other, out = torch.randn_like(x), torch.empty_like(x)
        copy, add = (lambda: out.copy_(x)), (lambda: torch.add(x, other, out=out))
        parts = [part for count in arrays for part in {2: [copy], 3: [add], 4: [copy, copy], 5: [add, copy]}[count]]
        return Work(lambda: [part() for part in parts])

    return prepare


def leaves_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor is not None and tensor.requires_grad)


def step(work: Work) -> Callable[[], object]:
    """Returns a call of forward and the leaves' gradients, or, without leaves, of forward outside autograd."""
    if not work.leaves:
        return torch.no_grad()(work.forward)
    gradients = [torch.randn_like(y) for y in outputs_of(work.forward())]
    return lambda: torch.autograd.grad(outputs_of(work.forward()), work.leaves, gradients)


def outputs_of(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
