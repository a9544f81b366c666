"""Dropout from a seed: the mask is recomputed where it is needed and never stored.

Element i of the contiguous (tokens, features) view gets u_i, the first of the four 32-bit outputs of Philox4x32-10
with counter (i, 0, 0, 0) and the two halves of the 64-bit seed as its key. It is kept where u_i >= floor(p * 2^32),
and kept elements are scaled by 1 / (1 - p). Triton's ``tl.randint(seed, i)`` gives the same stream.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ELEMENTS = 2**32
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 20


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's generator, drawn on the device so that nothing waits for it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox(seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit outputs for counter (index, 0, 0, 0), as int64 tensors of index' shape."""
    # int64 products wrap around, which leaves the bit pattern of the unsigned product.
    c0, c1, c2, c3 = index, *(torch.zeros_like(index) for _ in range(3))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(right) ^ c1 ^ k0, right & _LOW, _high(left) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _LOW


def threshold(p: float) -> int:
    return int(p * 2**32)


@torch.no_grad()
def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, first: int = 0) -> Tensor:
    """Which of the elements from ``first`` on stay: a bool tensor of ``shape``."""
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    flat = keep.view(-1)
    for start in range(0, flat.shape[0], _CHUNK):
        part = flat[start : start + _CHUNK]
        index = torch.arange(first + start, first + start + part.shape[0], device=seed.device)
        part.copy_(philox(seed, index)[0] >= threshold(p))
    return keep


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(x) of a (tokens, features) tensor. It is its own derivative: dropout(dy) is the gradient."""
    if p == 0:
        return x
    return torch.where(keep_mask(seed, tuple(x.shape), p), x * (1 / (1 - p)), 0)
