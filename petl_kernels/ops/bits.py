"""Packed bools: one bit an element, where a backward pass needs no more of it.

Bit k of byte j of a row is element 8j + k (little-endian); each row is padded with zeros to whole bytes, so the rows
of (tokens, f) bools take ceil(f / 8) bytes each and can be read on their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_width(features: int) -> int:
    """Returns the bytes of a packed row."""
    return (features + 7) // 8


def pack_bits(rows: Tensor) -> Tensor:
    """Returns bools (..., f) as uint8 (..., ceil(f / 8))."""
    padded = F.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (torch.unflatten(padded, -1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, features: int) -> Tensor:
    """Returns uint8 (..., ceil(f / 8)) as bools (..., f): the inverse of ``pack_bits``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :features].bool()
