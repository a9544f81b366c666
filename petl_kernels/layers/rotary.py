"""Rotary positions: pairs of features, turned by an angle that grows with the position.

rotated(x) = x ⊙ cos + R(x) ⊙ sin,  R(x) = [-x₂, x₁] of the halves [x₁, x₂]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """The cos and sin (batch or 1, tokens, head_dim) that a model gives to the layers of a stack."""

    cos: Tensor
    sin: Tensor


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Returns x (batch, heads, tokens, head_dim), turned, rounded once to its dtype."""
    cos, sin = (own.unsqueeze(1) for own in rotary)
    return (x * cos + _half(x) * sin).to(x.dtype)


def rotated_back(dy: Tensor, rotary: Rotary) -> Tensor:
    """Returns the gradient of x from that of ``rotated(x)``."""
    cos, sin = (own.unsqueeze(1) for own in rotary)
    return (dy * cos - _half(dy * sin)).to(dy.dtype)


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
