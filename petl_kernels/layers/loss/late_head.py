"""The module that stands for a model's output projection in a forward pass with labels."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from petl_kernels.layers.loss.late_logits import LateLogits
from petl_kernels.layers.loss.obstacles import head_obstacle
from petl_kernels.layers.loss.projection import ForwardPass, Projection
from petl_kernels.layers.uncompiled import uncompiled
from petl_kernels.models.transformers_names import head_linear

OPTIONS = ("label_smoothing", "reduction", "counted")  # of the loss, beside labels
# The model whose forward pass runs in this thread, and what stands for its output projection.
heads: ContextVar[tuple[nn.Module | None, LateHead | None]] = ContextVar("petl_heads", default=(None, None))


class LateHead(nn.Linear):
    """Stands for ``head``, an output projection: a call of it returns late logits, all else is the head's.

    A head that got a hook or another forward inside of the forward pass is called itself; RuntimeError where the loss
    has ``options``, which the head's own logits would lose.
    """

    __slots__ = ("petl_forward", "petl_head", "petl_options")  # the other attributes are the head's

    def __init__(self, head: nn.Linear, forward: ForwardPass, options: bool):
        object.__setattr__(self, "__dict__", head.__dict__)
        for name, value in (("petl_head", head), ("petl_forward", forward), ("petl_options", options)):
            object.__setattr__(self, name, value)

    @property
    def __class__(self) -> type:
        return type(self.petl_head)

    def __eq__(self, other: object) -> bool:
        return other is self.petl_head or (type(other) is LateHead and other.petl_head is self.petl_head)

    def __hash__(self) -> int:
        return hash(self.petl_head)

    def __reduce_ex__(self, protocol):
        return self.petl_head.__reduce_ex__(protocol)

    @uncompiled
    def __call__(self, *args, **kwargs) -> Tensor:
        obstacle = head_obstacle(self.petl_head)
        if not obstacle:
            weight = head_linear(self.petl_head).weight
            operands: tuple[Any, ...] = *args, *kwargs.values(), weight, self.petl_forward
            return LateLogits.of(Projection(*operands))
        if self.petl_options:
            raise RuntimeError(f"loss with {', '.join(OPTIONS)}: {obstacle}, since the forward pass has begun")
        return self.petl_head(*args, **kwargs)


@uncompiled
def late_head(head: nn.Linear, forward: ForwardPass, options: bool) -> LateHead:
    """Returns a ``LateHead``, outside of compiled graphs."""
    return LateHead(head, forward, options)


@uncompiled
def head_of(model: nn.Module) -> nn.Module | None:
    """Returns the output projection of ``model``, or what stands for it in a forward pass of this thread."""
    running, late = heads.get()
    head = model._modules["lm_head"]
    return late if late is not None and running is model and late.petl_head is head else head
