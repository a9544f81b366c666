"""Adapters on the linear layers of a block."""

from __future__ import annotations

from typing import Any

from torch import nn

from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.layers.wide_linear import WIDE
from petl_kernels.methods.lora import LoRALinear
from petl_kernels.methods.pieces import Piece

# Classes of linear layers whose forward depends on their input and parameters alone.
LINEARS = (nn.Linear, LoRALinear, FrozenLinear)
# Those that the rule of a layer runs: also such as leave autocast, at the end of a feed-forward network.
BOUND = (*LINEARS, *WIDE.values())


def active_piece(module: Any) -> Piece | None:
    """Returns the piece of the active adapter on ``module``; None where there is none."""
    return module.petl.current() if hasattr(module, "petl") else None


def has_other_hooks(linear: nn.Module) -> bool:
    """Returns whether ``linear`` has forward hooks beside the two that hand its input and output to its piece."""
    own = 1 if hasattr(linear, "petl") else 0
    return len(linear._forward_hooks) != own or len(linear._forward_pre_hooks) != own


def is_plain(module: nn.Module) -> bool:
    """Returns whether ``module.forward`` may be called in the place of ``module``, with its piece handled apart."""
    return type(module) in LINEARS and not has_other_hooks(module)
