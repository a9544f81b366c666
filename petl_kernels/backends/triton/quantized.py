"""Products with a quantized frozen weight Ŵ (N, K) in Triton: rows Ŵᵀ + c and rows Ŵ.

Three ways. Up to config.QUANTIZED_VECTOR_ROWS rows: no product of tiles, but one pass over the weight's bytes for each
row, in one launch with enough programs for a card; the second row finds them in the L2 cache. Few rows: tiles of Ŵ are
dequantized in the main loop, so that half (int8) or a quarter (nf4) of the dense weight's bytes travel. Many rows,
where the main loop would dequantize Ŵ again for each tile of them, and a K that 64 does not divide: tiles of Ŵ of at
most CUDA_TILE_BYTES (ops/quantized) are dequantized once, one after the other, ahead of the library's product.
"""

# A type checker cannot follow ``@triton.jit``: to it, kernels and ``tl.range`` never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import launch, load, store, sum_partials
from petl_kernels.backends.triton.registry import DTYPES, serves
from petl_kernels.dispatch import register
from petl_kernels.ops.quantized.code_book import dynamic_map
from petl_kernels.ops.quantized.storage import reference_dequantize, storage_of


@serves
def quantized_project(
    rows: torch.Tensor, parts: list[torch.Tensor], bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns rows (tokens, K) Ŵᵀ + bias (N), in `out` where that is given, which is contiguous."""
    inner = rows.shape[1]
    outputs = _other_size(parts, inner)
    y = rows.new_empty(rows.shape[0], outputs) if out is None else out
    if config.takes_rows_alone(rows, inner):
        return _rows_alone(_project_rows_kernel, y, rows, parts, bias, inner, config.quantized_row(inner))
    if config.dequantizes_in_loop(rows, inner, storage_of(parts)):
        return _product(_quantized_project_kernel, y, rows, parts, bias, inner)
    size = config.quantized_tile_length(rows, outputs, inner)
    for part, weight in _tiles(parts, rows, (outputs, inner), 0, size):
        if bias is None:
            torch.mm(rows, weight.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], rows, weight.t(), out=y[:, part])
    return y


@serves
def quantized_project_back(
    rows: torch.Tensor, parts: list[torch.Tensor], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns rows (tokens, N) Ŵ, in `out` where that is given, which is contiguous."""
    outputs = rows.shape[1]
    inner = _other_size(parts, outputs)
    dx = rows.new_empty(rows.shape[0], inner) if out is None else out
    if config.takes_rows_alone(rows, inner):
        return _rows_alone(_project_back_rows_kernel, dx, rows, parts, None, outputs, config.QUANTIZED_ROW_BACK)
    if config.dequantizes_in_loop(rows, inner, storage_of(parts)):
        return _product(_quantized_project_back_kernel, dx, rows, parts, None, outputs)
    # Tiles of columns: each sum over the rows of Ŵ is one product, so no partial sum is rounded.
    size = config.quantized_tile_length(rows, inner, outputs)
    for part, weight in _tiles(parts, rows, (outputs, inner), 1, size):
        torch.mm(rows, weight, out=dx[:, part])
    return dx


@register("dequantize", "triton")
def dequantize(parts: list[torch.Tensor], first_row: int, rows: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns rows first_row to first_row + rows of Ŵ (N, K) in ``dtype``."""
    if dtype not in DTYPES:
        return reference_dequantize(parts, first_row, rows, K, dtype)
    out = parts[0].new_empty(rows, K, dtype=dtype)
    _dequantize(parts, out, first_row, 0, K)
    return out


def _product(kernel, y: torch.Tensor, x: torch.Tensor, parts: list[torch.Tensor], bias, summed: int) -> torch.Tensor:
    """Writes x (rows, summed) times Ŵ or Ŵᵀ (summed, cols) into y, by a kernel that dequantizes in its main loop."""
    rows, cols = y.shape
    if y.numel() == 0:
        return y
    tile = config.quantized_tile(x, rows)
    tiles = config.cdiv(rows, tile.m), config.cdiv(cols, tile.n)
    splits = config.inner_splits(x, tile, tiles[0] * tiles[1], summed)
    out = y if splits == 1 else x.new_empty(splits, rows * cols, dtype=torch.float32)
    launch(
        kernel, (*tiles, splits), out, x, *_arguments(parts), bias, rows, cols, summed, x.stride(0),
        BM=tile.m, BN=tile.n, BK=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, [y])
    return y


def _rows_alone(kernel, y: torch.Tensor, x: torch.Tensor, parts: list[torch.Tensor], bias, summed: int, tile):
    """Writes x (rows, summed) times Ŵ or Ŵᵀ (summed, cols) into y, each row by programs of its own."""
    cols = y.shape[1]
    if y.numel():
        launch(
            kernel, (config.cdiv(cols, tile.n), x.shape[0]), y, x, *_arguments(parts), bias, cols, summed, x.stride(0),
            BN=tile.n, BK=tile.k, AHEAD=tile.stages, warps=tile.warps, stages=1,
        )  # fmt: skip
    return y


def _other_size(parts: list[torch.Tensor], size: int) -> int:
    """Returns N for K, or K for N. Two values of nf4 share a byte, the last of which may be half empty."""
    values = parts[0].numel() * (1 if storage_of(parts) == "int8" else 2)
    return values // size if size else 0


def _tiles(
    parts: list[torch.Tensor], like: torch.Tensor, shape: tuple[int, int], along: int, size: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields tiles of Ŵ, `size` long along one dimension and whole along the other; each overwrites the one before."""
    scratch = like.new_empty(min(size, shape[along]) * shape[1 - along])
    for first in range(0, shape[along], size):
        length = min(size, shape[along] - first)
        tile_shape = (length, shape[1]) if along == 0 else (shape[0], length)
        tile = scratch[: length * shape[1 - along]].view(tile_shape)
        _dequantize(parts, tile, *((first, 0) if along == 0 else (0, first)), shape[1])
        yield slice(first, first + length), tile


def _dequantize(parts: list[torch.Tensor], out: torch.Tensor, first_row: int, first_col: int, inner: int) -> None:
    """Writes Ŵ[first_row : first_row + rows, first_col : first_col + cols] into out (rows, cols)."""
    rows, cols = out.shape
    if out.numel() == 0:
        return
    tile = config.DEQUANTIZE
    launch(
        _dequantize_kernel, (config.cdiv(rows, tile.m), config.cdiv(cols, tile.n)), out, *_arguments(parts), first_row,
        first_col, rows, cols, inner, ALIGNED=inner % 64 == 0 and first_col % 64 == 0, BM=tile.m, BN=tile.n,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _arguments(parts: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Returns (data, scale, absmax, offset, dynamic map); the last three are None for int8."""
    if storage_of(parts) == "int8":
        return *parts, None, None, None
    data, absmax, scale, offset = parts
    return data, scale, absmax, offset, dynamic_map(data.device)


@triton.jit
def _block_scales(block, inside, absmax, scale, offset, table):
    """Returns the fp32 absmaxes of blocks of 64 values."""
    index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    return tl.load(table + index) * tl.load(scale + block // 256, mask=inside, other=0.0) + tl.load(offset)


@triton.jit
def _of_four(bit0, bit1, a, b, c, d):
    return tl.where(bit1, tl.where(bit0, d, c), tl.where(bit0, b, a))


@triton.jit
def _code(nibble):
    """Returns numbers of NF4's code book by selects: the pipeline would copy a load here ahead, like an operand."""
    bit0, bit1, bit2 = (nibble & 1) != 0, (nibble & 2) != 0, (nibble & 4) != 0
    a = _of_four(bit0, bit1, -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    b = _of_four(bit0, bit1, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    c = _of_four(bit0, bit1, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    d = _of_four(bit0, bit1, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
    return tl.where(nibble >= 8, tl.where(bit2, d, c), tl.where(bit2, b, a)).to(tl.float32)


@triton.jit
def _codes(packed, LOOK_UP: tl.constexpr):
    """Returns the codes (rows, 2 bytes) of the nibbles of (rows, bytes), the high one first.

    LOOK_UP takes them from a table in shared memory: 8 instructions a value fewer, but a barrier, which slows the loop
    around a product."""
    packed = packed.to(tl.int32)
    if LOOK_UP:
        ROWS: tl.constexpr = packed.shape[0]
        COLS: tl.constexpr = 2 * packed.shape[1]
        nibbles = tl.reshape(tl.interleave(packed >> 4, packed & 15), (ROWS * COLS,))
        codes = tl.reshape(tl.gather(_code(tl.arange(0, 16)), nibbles, 0), (ROWS, COLS))
    else:
        codes = tl.interleave(_code(packed >> 4), _code(packed & 15))
    return codes


@triton.jit
def _aligned_tile(
    row, col, row_inside, width, data, scale, absmax, offset, table,
    ROWS: tl.constexpr, COLS: tl.constexpr, LOOK_UP: tl.constexpr,
):  # fmt: skip
    """Returns Ŵ in fp32 for rows `row` and the COLS columns from `col` on.

    Either 64 divides the width of Ŵ and `col`, or COLS divides both 64 and `col`.
    """
    if absmax is None:
        at = col + tl.arange(0, COLS)
        value = tl.load(data + row[:, None] * width + at, mask=row_inside[:, None] & (at < width)[None, :], other=0)
        return value.to(tl.float32) * tl.load(scale + row, mask=row_inside, other=0.0)[:, None]
    else:
        BLOCKS: tl.constexpr = (COLS + 63) // 64
        byte = col // 2 + tl.arange(0, COLS // 2)
        block = col // 64 + tl.arange(0, BLOCKS)
        inside = row_inside[:, None] & (byte < width // 2)[None, :]
        packed = tl.load(data + row[:, None] * (width // 2) + byte[None, :], mask=inside, other=0)
        codes = _codes(packed, LOOK_UP)
        inside = row_inside[:, None] & (block < width // 64)[None, :]
        scales = _block_scales(row[:, None] * (width // 64) + block[None, :], inside, absmax, scale, offset, table)
        return tl.reshape(tl.reshape(codes, (ROWS, BLOCKS, COLS // BLOCKS)) * scales[:, :, None], (ROWS, COLS))


@triton.jit
def _project_rows_kernel(
    y, x, data, scale, absmax, offset, table, bias, N, K, stride_x,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Writes y = Ŵ x for BN rows of Ŵ and one row of x, with fp32 sums of its own. 64 divides K and BK."""
    row = tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = cols < N
    acc = tl.zeros((BN, BK if absmax is None else BK // 64), tl.float32)
    for start in tl.range(0, K, BK, num_stages=AHEAD):
        k = start + tl.arange(0, BK)
        factor = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
        if absmax is None:
            value = tl.load(data + cols[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
            acc += value.to(tl.float32) * factor[None, :]
        else:
            byte = start // 2 + tl.arange(0, BK // 2)
            byte_inside = inside[:, None] & (byte < K // 2)[None, :]
            packed = tl.load(data + cols[:, None] * (K // 2) + byte[None, :], mask=byte_inside, other=0)
            block = start // 64 + tl.arange(0, BK // 64)
            block_inside = inside[:, None] & (block < K // 64)[None, :]
            at = cols[:, None] * (K // 64) + block[None, :]
            largest = _block_scales(at, block_inside, absmax, scale, offset, table)
            products = tl.reshape(_codes(packed, True) * factor[None, :], (BN, BK // 64, 64))
            acc += tl.sum(products, 2) * tl.where(block_inside, largest, 0.0)
    out = tl.sum(acc, 1)
    if absmax is None:
        out *= tl.load(scale + cols, mask=inside, other=0.0)
    if bias is not None:
        out += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _project_back_rows_kernel(
    dx, dy, data, scale, absmax, offset, table, bias, K, N, stride_dy,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Writes dx = dy Ŵ for BN columns of Ŵ and one row of dy, in fp32, BK rows of Ŵ at a time; no bias.

    BN divides 64, and 64 divides K.
    """
    row = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BK, BN), tl.float32)
    for start in tl.range(0, N, BK, num_stages=AHEAD):
        n = (start + tl.arange(0, BK)).to(tl.int64)
        factor = tl.load(dy + row * stride_dy + n, mask=n < N, other=0.0).to(tl.float32)
        tile = _aligned_tile(n, tl.program_id(0) * BN, n < N, K, data, scale, absmax, offset, table, BK, BN, True)
        acc += tile * factor[:, None]
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(dx + row * K + cols, tl.sum(acc, 0).to(dx.dtype.element_ty), mask=cols < K)


@triton.jit
def _part(summed, BK: tl.constexpr):
    """Returns this program's part of the summed dimension, which the third axis of the grid splits."""
    length = tl.cdiv(tl.cdiv(summed, BK), tl.num_programs(2)) * BK
    start = tl.program_id(2) * length
    return start, min(start + length, summed)


@triton.jit
def _quantized_project_kernel(
    y, x, data, scale, absmax, offset, table, bias, M, N, K, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes yᵀ = Ŵ xᵀ for a tile. Ŵ is the left operand, which a matrix instruction takes from the registers where it
    was dequantized, and few rows of x fill its narrow side. BK divides 64, and 64 divides K."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_inside, col_inside = rows < M, cols < N
    begin, end = _part(K, BK)

    acc = tl.zeros((BN, BM), tl.float32)
    if absmax is not None:
        block = cols * (K // 64)
        scales = _block_scales(block + begin // 64, col_inside, absmax, scale, offset, table)
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK)
        right = tl.load(x + rows[None, :] * stride_x + k[:, None], mask=row_inside[None, :], other=0.0)
        if absmax is None:
            left = tl.load(data + cols[:, None] * K + k[None, :], mask=col_inside[:, None], other=0).to(right.dtype)
        else:
            byte = start // 2 + tl.arange(0, BK // 2)
            packed = tl.load(data + cols[:, None] * (K // 2) + byte[None, :], mask=col_inside[:, None], other=0)
            left = (_codes(packed, False) * scales[:, None]).to(right.dtype)
            # Ahead of their use: each is a chain of three loads.
            ahead = (start + BK) // 64
            scales = _block_scales(block + ahead, col_inside & (start + BK < end), absmax, scale, offset, table)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    if absmax is None:
        acc *= tl.load(scale + cols, mask=col_inside, other=0.0)[:, None]
    out = tl.trans(acc)
    if bias is not None:
        first = tl.program_id(2) == 0
        out += tl.load(bias + cols, mask=col_inside & first, other=0.0).to(tl.float32)[None, :]
    y += tl.program_id(2).to(tl.int64) * M * N
    store(y + rows[:, None] * N + cols[None, :], out, row_inside, col_inside)


@triton.jit
def _quantized_project_back_kernel(
    dx, dy, data, scale, absmax, offset, table, bias, M, K, N, stride_dy,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes dx = dy Ŵ for a tile of BN columns, BK rows of Ŵ at a time; no bias.

    int8's scale falls on Ŵ and not on dy, whose small numbers would leave fp16.
    """
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < K
    begin, end = _part(N, BK)

    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        n = (start + tl.arange(0, BK)).to(tl.int64)
        left = load(dy + rows[:, None] * stride_dy + n[None, :], row_inside, n < end)
        right = _aligned_tile(n, tl.program_id(1) * BN, n < end, K, data, scale, absmax, offset, table, BK, BN, False)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    dx += tl.program_id(2).to(tl.int64) * M * K
    store(dx + rows[:, None] * K + cols[None, :], acc, row_inside, col_inside)


@triton.jit
def _dequantize_kernel(
    out, data, scale, absmax, offset, table, first_row, first_col, rows, cols, K,
    ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes Ŵ[first_row : first_row + rows, first_col : first_col + cols] into out.

    ALIGNED: 64 divides K and first_col.
    """
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    row_inside, col_inside = row < rows, col < cols
    if ALIGNED:
        start = first_col + tl.program_id(1) * BN
        value = _aligned_tile(first_row + row, start, row_inside, K, data, scale, absmax, offset, table, BM, BN, True)
    else:
        inside = row_inside[:, None] & col_inside[None, :]
        index = (first_row + row)[:, None] * K + (first_col + col)[None, :]
        if absmax is None:
            value = tl.load(data + index, mask=inside, other=0).to(tl.float32)
            value *= tl.load(scale + first_row + row, mask=row_inside, other=0.0)[:, None]
        else:
            packed = tl.load(data + index // 2, mask=inside, other=0).to(tl.int32)
            nibble = tl.where(index % 2 == 0, packed >> 4, packed & 15)
            value = _code(nibble) * _block_scales(index // 64, inside, absmax, scale, offset, table)
    store(out + row[:, None] * cols + col[None, :], value, row_inside, col_inside)
