"""Tables of NF4, on each device once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 sorted numbers that the 8 bits of an absmax stand for: bitsandbytes' signed dynamic map."""
    return table(_entries(), device)


@functools.cache
def _entries() -> tuple[float, ...]:
    """0, 1, and on both sides of 0 seven decades, each with twice as many entries as the one below it."""
    entries = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        entries += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(entries))
