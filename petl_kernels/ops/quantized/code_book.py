"""Numbers that int8's and NF4's bits stand for, as tensors that each device holds once."""

from __future__ import annotations

import functools

import torch

BLOCK = 64  # values that share an absmax
SUPERBLOCK = 256  # absmaxes that share a scale

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A value above NF4_THRESHOLDS[i] has a code above i.
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


@functools.cache
def table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Returns ``values`` in fp32 on ``device``; the same tensor each time."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device) -> torch.Tensor:
    """Returns the 256 sorted numbers that the 8 bits of an absmax stand for: bitsandbytes' signed dynamic map."""
    return table(_entries(), device)


@functools.cache
def _entries() -> tuple[float, ...]:
    """Returns 0, 1, and on both sides of 0 seven decades, each with twice as many entries as the one below it."""
    entries = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        entries += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(entries))
