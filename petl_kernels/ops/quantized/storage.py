"""Storages of a frozen weight: dense, int8 and NF4, their layout, and the reference that makes and reads them.

A weight W (N, K) is held as a list of plain tensors. The dtype of the first one names the storage (``storage_of``), so
that the tensors of several weights may stand in one list:

    dense   [W]                                     floating point
    int8    [data, scale]                           Ŵ_nk = data_nk · scale_n
            data int8 (N, K), scale fp32 (N,)       scale = max_k |W_nk| / 127, or 1; data = W / scale, rounded to even
    nf4     [data, absmax, absmax_scale, absmax_offset]
            over the flattened W in blocks of 64    Ŵ_i = code[nibble_i] · a_b,  b = i // 64
            data uint8 (⌈NK / 2⌉,)                  value 2i in the high half of byte i, value 2i + 1 in the low one
            absmax uint8 (blocks,)                  a_b = map[absmax_b] · absmax_scale_(b // 256) + absmax_offset
            absmax_scale fp32 (⌈blocks / 256⌉,)     max over 256 blocks of |a - offset|
            absmax_offset fp32 (1,)                 the mean of all a = max |W| of a block

The nibble is the code of value / a that is nearest, by the thresholds of bitsandbytes; the codes are the quantiles of a
normal distribution that QLoRA publishes. ``map`` is its signed dynamic map of 256 entries. All of this is fp32, and Ŵ
is rounded to the dtype of the product it enters, which is that of the other factor (bf16, fp16, fp32, fp64).

Source: LLM.int8(), arXiv 2208.07339 (one scale a row, no outliers); QLoRA, arXiv 2305.14314 (NF4, double quantization);
8-bit optimizers, arXiv 2110.02861 (the dynamic map).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import register
from petl_kernels.errors import InputError
from petl_kernels.ops.quantized.code_book import (
    BLOCK,
    NF4_CODE,
    NF4_THRESHOLDS,
    SUPERBLOCK,
    dynamic_map,
    table,
)

STORAGES = ("int8", "nf4")
TILE_BYTES = 1 << 20
CUDA_TILE_BYTES = 32 << 20  # of the tiles that Triton's kernels dequantize before the library multiplies with them

# The names of a quantized weight's tensors, which are attributes of ``QuantizedTensor``.
PARTS = {"int8": ("packed", "scale"), "nf4": ("packed", "absmax", "absmax_scale", "absmax_offset")}

_STORAGE_OF = {torch.int8: "int8", torch.uint8: "nf4"}


def storage_of(parts: list[Tensor]) -> str:
    """Returns "int8", "nf4" or "dense", by the dtype of the first of a weight's tensors."""
    return _STORAGE_OF.get(parts[0].dtype, "dense")


def is_quantized(parts: list[Tensor]) -> bool:
    """Returns whether these tensors hold a weight in int8 or NF4."""
    return storage_of(parts) != "dense"


def split_parts(flat: list[Tensor]) -> list[list[Tensor]]:
    """Returns the tensors of each weight, from those of several weights one after the other."""
    groups: list[list[Tensor]] = []
    first = 0
    while first < len(flat):
        size = len(PARTS.get(storage_of(flat[first:]), ("weight",)))
        groups.append(flat[first : first + size])
        first += size
    return groups


def parts_in(flat: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns ``flat`` with dense weights cast to ``dtype``; quantized ones are cast tile by tile in their products."""
    if all(part.dtype == dtype for part in flat):
        return flat
    return [part if is_quantized(parts) else part.to(dtype) for parts in split_parts(flat) for part in parts]


def out_features(parts: list[Tensor], columns: int) -> int:
    """Returns N of a weight (N, ``columns``)."""
    return parts[0].shape[0] if parts[0].dim() == 2 else 2 * parts[0].shape[0] // columns


def in_features(parts: list[Tensor], rows: int) -> int:
    """Returns K of a weight (``rows``, K)."""
    return parts[0].shape[1] if parts[0].dim() == 2 else 2 * parts[0].shape[0] // rows


def row_blocks(parts: list[Tensor], rows: int, columns: int, most: int) -> Iterator[slice]:
    """Yields the rows of a quantized weight (rows, columns) in blocks of about ``most`` that ``part_rows`` can cut."""
    nf4 = storage_of(parts) == "nf4"
    step = BLOCK * SUPERBLOCK // math.gcd(BLOCK * SUPERBLOCK, columns) if nf4 else 1
    # In NF4 the length of a single odd row is not known from its bytes: odd ones stay together.
    size = rows if nf4 and columns % 2 else max(step, most // step * step)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def part_rows(parts: list[Tensor], rows: slice, columns: int) -> list[Tensor]:
    """Returns the tensors of one of the blocks that ``row_blocks`` yields, as views."""
    if storage_of(parts) == "int8":
        return [part[rows] for part in parts]
    data, absmax, scale, offset = parts
    first, last = rows.start * columns, rows.stop * columns
    values = (2, BLOCK, BLOCK * SUPERBLOCK)  # of the weight, in one element of each tensor
    return [*(part[first // n : -(-last // n)] for part, n in zip((data, absmax, scale), values, strict=True)), offset]


def tiles(rows: int, columns: int, dtype: torch.dtype, most: int = TILE_BYTES) -> Iterator[slice]:
    """Yields the rows of a (rows, columns) weight in tiles of at most ``most`` bytes in ``dtype``, or of one row."""
    size = max(1, most // (columns * dtype.itemsize))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def storage_bytes(shape: tuple[int, ...], storage: str | None, dtype: torch.dtype) -> int:
    """Returns the bytes of a weight of ``shape`` in ``storage``; None is dense, in ``dtype``."""
    if storage is None:
        return math.prod(shape) * dtype.itemsize
    check_layout(tuple(shape), storage)
    return sum(math.prod(size) * kind.itemsize for size, kind in part_shapes(shape, storage))


def part_shapes(shape: tuple[int, ...], storage: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shapes and dtypes of the tensors that hold a weight (rows, columns) in ``storage``."""
    rows, columns = shape
    if storage == "int8":
        return [((rows, columns), torch.int8), ((rows,), torch.float32)]
    blocks = -(-rows * columns // BLOCK)
    return [
        ((-(-rows * columns // 2),), torch.uint8),
        ((blocks,), torch.uint8),
        ((-(-blocks // SUPERBLOCK),), torch.float32),
        ((1,), torch.float32),
    ]


def check_layout(shape: tuple[int, ...], storage: str) -> None:
    """Refuses an unknown storage and a shape that it cannot hold."""
    if storage not in STORAGES:
        raise InputError(f"quantize: storage is {storage!r}: expected {' or '.join(STORAGES)}")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"quantize: shape is {shape}: expected (rows, columns) of at least 1")
    if storage == "nf4" and 1 in shape and math.prod(shape) % 2:
        raise InputError(f"quantize: shape is {shape}: expected an even number of values for nf4 in one row or column")


@register("quantize_int8", "reference")
def reference_quantize_int8(weight: Tensor) -> list[Tensor]:
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows, columns = weight.shape
    for part in tiles(rows, columns, torch.float32):
        values = weight[part].float()
        largest = values.abs().amax(1)
        scale[part] = torch.where(largest == 0, 1.0, largest / 127)
        data[part] = (values / scale[part, None]).round()
    return [data, scale]


@register("quantize_nf4", "reference")
def reference_quantize_nf4(weight: Tensor) -> list[Tensor]:
    flat = weight.reshape(-1)
    data = torch.empty(-(-flat.shape[0] // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.shape[0] // BLOCK), dtype=torch.float32, device=flat.device)
    thresholds = table(NF4_THRESHOLDS, flat.device)
    for part in tiles(absmax.shape[0], BLOCK, torch.float32):
        blocks = _in_blocks(flat[part.start * BLOCK : part.stop * BLOCK], BLOCK)
        absmax[part] = blocks.abs().amax(1)
        nibbles = torch.bucketize(_over(blocks, absmax[part]), thresholds, out_int32=True).view(-1, 2)
        packed = (nibbles[:, 0] << 4 | nibbles[:, 1]).to(torch.uint8)
        data[part.start * BLOCK // 2 : part.stop * BLOCK // 2] = packed[: data.shape[0] - part.start * BLOCK // 2]
    return [data, *_quantize_absmax(absmax)]


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The mean is made in fp64, so that no order of additions shows in its fp32 value.
    offset = absmax.mean(0, keepdim=True, dtype=torch.float64).float()
    blocks = _in_blocks(absmax - offset, SUPERBLOCK)
    scale = blocks.abs().amax(1)
    entries = dynamic_map(absmax.device)
    middles = (entries[:-1] + entries[1:]) / 2
    indices = torch.bucketize(_over(blocks, scale), middles, out_int32=True)
    return indices.view(-1)[: absmax.shape[0]].to(torch.uint8), scale, offset


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """Returns (blocks, size) in fp32, with zeros after the end."""
    return F.pad(flat.float(), (0, -flat.shape[0] % size)).view(-1, size)


def _over(blocks: Tensor, largest: Tensor) -> Tensor:
    """Returns blocks / largest, and 0 where a block is all zeros."""
    return blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(1)


@register("dequantize", "reference")
def reference_dequantize(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    last_row = first_row + rows
    if storage_of(parts) == "int8":
        data, scale = (part[first_row:last_row] for part in parts)
        return (data.float() * scale.unsqueeze(1)).to(dtype)
    index = torch.arange(first_row * columns, last_row * columns, device=parts[0].device)
    return nf4_values(parts, index).view(rows, columns).to(dtype)


def nf4_values(parts: list[Tensor], index: Tensor) -> Tensor:
    """Returns the values at ``index`` of the flattened weight, in fp32."""
    data, absmax, scale, offset = parts
    code = table(NF4_CODE, data.device)
    byte = data[index // 2]
    nibble = torch.where(index % 2 == 0, byte >> 4, byte & 15).int()
    block = index // BLOCK
    largest = dynamic_map(data.device)[absmax[block].int()] * scale[block // SUPERBLOCK] + offset
    return code[nibble] * largest
