"""int8 and NF4 weights in plain PyTorch, for the tests of the GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.backends.nf4 import dynamic_map

CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
THRESHOLDS = torch.tensor(
    [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
        *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
        *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
        *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ]
)


def quantise(weight: Tensor, storage: str) -> list[Tensor]:
    return quantise_int8(weight) if storage == "int8" else quantise_nf4(weight)


def quantise_int8(weight: Tensor) -> list[Tensor]:
    absmax = weight.float().abs().amax(1)
    scale = torch.where(absmax == 0, 1.0, absmax / 127)
    return [(weight.float() / scale[:, None]).round().to(torch.int8), scale]


def quantise_nf4(weight: Tensor) -> list[Tensor]:
    blocks = _blocks(weight.float().flatten(), 64)
    largest = blocks.abs().amax(1)
    nibbles = torch.bucketize(_over(blocks, largest), THRESHOLDS).flatten()[: weight.numel() + weight.numel() % 2]
    data = (nibbles[::2] << 4 | nibbles[1::2]).to(torch.uint8)
    offset = largest.double().mean(0, keepdim=True).float()
    apart = _blocks(largest - offset, 256)
    scale = apart.abs().amax(1)
    table = dynamic_map(torch.device("cpu"))
    absmax = torch.bucketize(_over(apart, scale), (table[:-1] + table[1:]) / 2).flatten()[: largest.numel()]
    return [data, absmax.to(torch.uint8), scale, offset]


def dequantise(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    part = slice(first_row * columns, (first_row + rows) * columns)
    if len(parts) == 2:
        values = (parts[0].float() * parts[1][:, None]).flatten()[part]
    else:
        data, absmax, scale, offset = parts
        index = torch.arange(part.start, part.stop)
        nibble = torch.where(index % 2 == 0, data[index // 2] >> 4, data[index // 2] & 15).long()
        largest = dynamic_map(torch.device("cpu"))[absmax.long()] * scale.repeat_interleave(256)[: len(absmax)] + offset
        values = CODE[nibble] * largest[index // 64]
    return values.view(rows, columns).to(dtype)


def _blocks(flat: Tensor, size: int) -> Tensor:
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _over(blocks: Tensor, largest: Tensor) -> Tensor:
    return blocks / torch.where(largest == 0, 1.0, largest)[:, None]
