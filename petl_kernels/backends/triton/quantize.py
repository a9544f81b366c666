"""int8 and NF4 weights made from dense ones in Triton, with the bits of the reference.

int8: one program a row, which is read from memory once (the second walk over it finds it in the cache). NF4: a program
has whole blocks of 64 values; codes come from four comparisons, each with a threshold that the ones before have chosen.
The blocks' absmaxes are then rounded by programs of 256, around the mean of all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import launch
from petl_kernels.backends.triton.registry import serves
from petl_kernels.ops.quantized.code_book import BLOCK, SUPERBLOCK, dynamic_map


@serves
def quantize_int8(weight: torch.Tensor) -> list[torch.Tensor]:
    """Returns [data int8 (N, K), scale fp32 (N,)]."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    data, scale = weight.new_empty(rows, columns, dtype=torch.int8), weight.new_empty(rows, dtype=torch.float32)
    block, warps = config.row_block(weight)
    launch(_quantize_int8_kernel, (rows,), data, scale, weight, columns, BN=block, warps=warps, stages=1)
    return [data, scale]


@serves
def quantize_nf4(weight: torch.Tensor) -> list[torch.Tensor]:
    """Returns [data uint8 (⌈NK / 2⌉,), absmax uint8 (blocks,), scale fp32 (⌈blocks / 256⌉,), offset fp32 (1,)]."""
    weight = weight.contiguous()
    values = weight.numel()
    blocks = config.cdiv(values, BLOCK)
    data = weight.new_empty(config.cdiv(values, 2), dtype=torch.uint8)
    largest = weight.new_empty(blocks, dtype=torch.float32)
    tile = config.QUANTIZE_BLOCKS
    launch(
        _quantize_nf4_kernel, (config.cdiv(blocks, tile.m),), data, largest, weight, values, BLOCKS=tile.m,
        warps=tile.warps, stages=1,
    )  # fmt: skip
    offset = largest.mean(0, keepdim=True, dtype=torch.float64).float()
    absmax = largest.new_empty(blocks, dtype=torch.uint8)
    scale = largest.new_empty(config.cdiv(blocks, SUPERBLOCK))
    table = dynamic_map(weight.device)
    launch(
        _quantize_absmax_kernel, scale.shape, absmax, scale, largest, offset, table, blocks, BLOCK=SUPERBLOCK,
        warps=4, stages=1,
    )  # fmt: skip
    return [data, absmax, scale, offset]


@triton.jit
def _magnitude(values):
    """Returns |values| as integers of the same order, in which nan is above all others and no maximum loses it."""
    return tl.abs(values.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _over(values, largest):
    """Returns values / largest, and 0 where all are zeros."""
    return tl.div_rn(values.to(tl.float32), tl.where(largest == 0.0, 1.0, largest))


@triton.jit
def _quantize_int8_kernel(data, scale, weight, d, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight, data = weight + row * d, data + row * d
    bits = tl.zeros((BN,), tl.int32)
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        bits = tl.maximum(bits, _magnitude(tl.load(weight + cols, mask=cols < d, other=0.0)))
    largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
    unit = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, 127.0))
    tl.store(scale + row, unit)
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        steps = tl.div_rn(tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32), unit)
        rounded = (steps + 12582912.0) - 12582912.0  # 3 · 2^22: whole numbers remain, ties to even
        tl.store(data + cols, rounded.to(tl.int8), mask=cols < d)


@triton.jit
def _of_four(bit0, bit1, a, b, c, d):
    return tl.where(bit1, tl.where(bit0, d, c), tl.where(bit0, b, a))


@triton.jit
def _nibble(value):
    """Returns how many of NF4_THRESHOLDS (petl_kernels/ops/quantized) lie below each value, bit by bit."""
    bit3 = value > 0.03979014977812767
    bit2 = value > tl.where(bit3, 0.3893125355243683, -0.33967943489551544)
    bit1 = value > _of_four(
        bit2, bit3, -0.6106329262256622, -0.13791173323988914, 0.2035212516784668, 0.6427869200706482
    )
    low = _of_four(bit1, bit2, -0.8480964004993439, -0.4599952697753906, -0.23460740596055984, -0.045525018125772476)
    high = _of_four(bit1, bit2, 0.1202552504837513, 0.2920137718319893, 0.5016634166240692, 0.8614784181118011)
    bit0 = value > tl.where(bit3, high, low)
    return (bit3.to(tl.int32) << 3) | (bit2.to(tl.int32) << 2) | (bit1.to(tl.int32) << 1) | bit0.to(tl.int32)


@triton.jit
def _quantize_nf4_kernel(data, absmax, weight, values, BLOCKS: tl.constexpr):
    """Writes two values a byte, the first in its high half, and the absmaxes in fp32; after the end are zeros."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    value = tl.load(weight + index, mask=index < values, other=0.0).to(tl.float32)
    largest = tl.max(_magnitude(value), 1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, mask=block * 64 < values)
    first, second = tl.split(tl.reshape(_nibble(_over(value, largest[:, None])), (BLOCKS, 32, 2)))
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(data + byte, ((first << 4) | second).to(tl.uint8), mask=byte * 2 < values)


@triton.jit
def _quantize_absmax_kernel(out, scale, absmax, offset, table, blocks, BLOCK: tl.constexpr):
    """Writes the absmaxes that share a scale, each as the number of middles between the table's numbers below it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    apart = tl.load(absmax + index, mask=index < blocks, other=0.0) - tl.load(offset)
    apart = tl.where(index < blocks, apart, 0.0)
    largest = tl.max(_magnitude(apart), 0).to(tl.float32, bitcast=True)
    tl.store(scale + tl.program_id(0), largest)
    value = _over(apart, largest)
    below = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        middle = (tl.load(table + below + step - 1) + tl.load(table + below + step)) * 0.5
        below += tl.where(middle < value, step, 0)
    tl.store(out + index, below.to(tl.uint8), mask=index < blocks)
