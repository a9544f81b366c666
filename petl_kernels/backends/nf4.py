"""The table that NF4's absmaxes go through, on each device once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 sorted numbers that the 8 bits of an absmax stand for: bitsandbytes' signed dynamic map."""
    entries = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        entries += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(entries), device=device)
