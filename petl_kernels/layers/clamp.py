"""The clamp of T5's family behind each block: in fp16 a sum that overflows is cut, and has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def clamped(h: Tensor) -> Tensor:
    """Returns h (...), in fp16 cut to ±(65,504 - 1,000), rounded, where any of it is infinite; nan stays."""
    if h.dtype != torch.float16:
        return h
    limit = _limit(h)
    return h.clamp(-limit, limit)


def clamped_backward(dy: Tensor, h: Tensor) -> Tensor:
    """Returns the gradient of h from that of ``clamped(h)``: 0 where h was cut, and where it is nan."""
    return dy if h.dtype != torch.float16 else dy.masked_fill(~(h.abs() <= _limit(h)), 0)


def _limit(h: Tensor) -> Tensor:
    largest = torch.finfo(h.dtype).max
    return torch.where(torch.isinf(h).any(), largest - 1000, largest)
