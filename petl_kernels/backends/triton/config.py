"""Block shapes, warps and pipeline depths: fixed per device class, input width and problem size, never autotuned.

Autotuning runs kernels with whatever memory they take, which a memory budget forbids, and picks differently from
run to run. Device classes (petl_kernels/cards.py) differ in the shared memory that a block may use: sm_80 163 KB,
sm_90 and sm_100 227 KB, sm_75 64 KB, and "small" for every other card (99 KB on sm_86, sm_89 and sm_120).
"interpreter" holds tiles small enough that tests meet several.

"fp32" serves fp32 on every card, and fp16 on sm_75: Triton makes tensor-core code from sm_80 on, so that a product runs
on the CUDA cores in both, in fp32, with operands and sums in registers. Tiles made for tensor cores spill there.

None of these numbers has been tuned on a card yet. They are the usual ones for each architecture, kept where the
compiler reports no spilled registers and the shared memory fits (tests/backends/test_triton_aot.py).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from petl_kernels.cards import class_of
from petl_kernels.ops.frozen_ffn import chunk_rows as ffn_chunk_rows
from petl_kernels.ops.lora_border import CUDA_PARTS
from petl_kernels.ops.quantized import CUDA_TILE_BYTES

# A sum of fewer elements over parts is spread over more programs.
SUM_FEW = 32 << 10
MAX_GROUPS = 3  # linears in one launch: q, k and v


class Tile(NamedTuple):
    m: int  # rows: tokens, except in sums over tokens, where these are columns of the activation
    n: int  # columns of the result
    k: int  # length of one step along the summed dimension
    warps: int
    stages: int


# Products with a rank-r factor read the activation once and are bound by memory; n is the largest block of ranks.
SKINNY = {
    "small": Tile(32, 64, 128, 4, 3),
    "sm80": Tile(64, 64, 128, 4, 3),
    "sm90": Tile(64, 64, 128, 4, 4),
    "sm100": Tile(64, 64, 128, 4, 4),
    "fp32": Tile(32, 64, 32, 4, 3),
    "interpreter": Tile(32, 32, 32, 4, 1),
}
# Sums over tokens: (columns of the activation) x (ranks or bottleneck), stepping k tokens at a time.
TOKEN_SUM = {
    "small": Tile(64, 64, 64, 4, 3),
    "sm80": Tile(64, 64, 64, 4, 4),
    "sm90": Tile(64, 128, 64, 4, 4),
    "sm100": Tile(64, 128, 64, 4, 4),
    "fp32": Tile(32, 64, 32, 4, 2),
    "interpreter": Tile(32, 32, 16, 4, 1),
}

# Gradients of an output, read once: m tokens whose ds stays in registers, k columns at a time.
GRADIENTS = {
    "small": Tile(128, 0, 32, 8, 2),
    "sm80": Tile(128, 0, 64, 4, 3),
    "sm90": Tile(128, 0, 64, 4, 3),
    "sm100": Tile(128, 0, 64, 4, 3),
    "fp32": Tile(32, 0, 32, 4, 2),
    "interpreter": Tile(32, 0, 32, 4, 1),
}
INTERPRETER_GRADIENT_PARTS = 2  # of a sum over blocks of such tokens

# The fused adapter: a block of m rows, n columns of the result at a time, steps of k columns of the input. The
# second entry serves accumulators wider than ADAPTER_NARROW.
ADAPTER = {
    "small": (Tile(64, 64, 64, 4, 3), Tile(32, 64, 32, 4, 2)),
    "sm80": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 8, 3)),
    "sm90": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 8, 3)),
    "sm100": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 8, 3)),
    "fp32": (Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    "interpreter": (Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
}
ADAPTER_NARROW = 64
# The widest bottleneck for which a block of rows stays fused, where its accumulators fit the registers; above, the
# library multiplies. Both are predicted to cross between 128 and 192; bench/GPU_PENDING.md has what decides it.
ADAPTER_FUSED = {"small": 64, "sm80": 128, "sm90": 128, "sm100": 128, "fp32": 32, "interpreter": 32}

ROW_PROGRAMS = 2  # for each multiprocessor, of those that walk over rows and add up over them
INTERPRETER_CHUNK_ROWS = 48

# Products with a quantized weight Ŵ. Up to so many rows it is dequantized in the main loop, again for each tile of
# rows; above, tiles of at most CUDA_TILE_BYTES are, once, ahead of the library's product (bench/NOTES.md).
QUANTIZED = {
    "small": Tile(128, 64, 64, 4, 3),
    "sm80": Tile(128, 64, 64, 4, 3),
    "sm90": Tile(128, 64, 64, 4, 4),
    "sm100": Tile(128, 64, 64, 4, 4),
    "fp32": Tile(32, 64, 32, 4, 2),
    "interpreter": Tile(32, 32, 32, 4, 1),
}
QUANTIZED_LOOP_ROWS = {"int8": 512, "nf4": 256}
# On sm_75 the library's product has tensor cores and the loop has none: 32 rows of it take a T4 about as long as
# writing and reading the tile (65 and 8 TFLOPS, 320 GB/s).
QUANTIZED_LOOP_ROWS_SM75 = 32
# A few rows one by one, up to so many: blocks of values of Ŵ of which each thread has 32, and for dx 32 columns by 256
# rows, the next ones ahead. A (1024, 1024) weight is on 256 programs, and 32 for dx, so all of it is under way at once.
QUANTIZED_VECTOR_ROWS = 4
QUANTIZED_ROW_VALUES = 4096
QUANTIZED_ROW_BACK = Tile(1, 32, 256, 8, 3)
INTERPRETER_QUANTIZED_TILE_BYTES = 8 << 10
DEQUANTIZE = Tile(8, 256, 0, 4, 1)
QUANTIZE_BLOCKS = Tile(32, 64, 0, 4, 1)  # 16 values a thread


class ElementwiseTile(NamedTuple):
    m: int  # rows
    n: int  # columns
    warps: int

    def grid(self, x: torch.Tensor) -> tuple[int, int]:
        return -(-x.shape[0] // self.m), -(-x.shape[1] // self.n)


# The words that one program of the vocabulary loss holds in registers: 16 a thread.
VOCABULARY_BLOCK = 4096
VOCABULARY_WARPS = 8
TOTAL_BLOCK = 1024  # numbers of a row of O that the loss by words multiplies at a time
# Attention: blocks of m queries and n keys; the second entry serves more than ATTENTION_NARROW features.
ATTENTION_FORWARD = {
    "small": (Tile(64, 64, 64, 4, 2), Tile(64, 32, 128, 4, 2)),
    "sm80": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "sm90": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "sm100": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "fp32": (Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    "sm75": (Tile(32, 32, 64, 8, 1), Tile(32, 32, 128, 8, 1)),
    "interpreter": (Tile(16, 32, 64, 4, 1), Tile(16, 32, 128, 4, 1)),
}
ATTENTION_BACKWARD = {
    "small": (Tile(32, 64, 64, 4, 2), Tile(32, 32, 128, 4, 2)),
    "sm80": (Tile(64, 64, 64, 8, 3), Tile(64, 64, 128, 8, 2)),
    "sm90": (Tile(64, 64, 64, 4, 3), Tile(64, 64, 128, 8, 3)),
    "sm100": (Tile(64, 64, 64, 4, 3), Tile(64, 64, 128, 8, 2)),
    "fp32": (Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    "sm75": (Tile(32, 32, 64, 8, 1), Tile(16, 32, 128, 8, 1)),
    "interpreter": (Tile(32, 32, 64, 4, 1), Tile(32, 32, 128, 4, 1)),
}
# Backward of whole sentences: up to m queries that stay, n keys at a time. Where operands of products are in registers
# (Ampere's instructions) there are none for more queries or wider heads, and in fp32 none at all.
ATTENTION_SENTENCE = {
    "small": (Tile(64, 32, 64, 4, 2), None),
    "sm80": (Tile(64, 32, 64, 4, 3), None),
    "sm90": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "sm100": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "interpreter": (Tile(64, 32, 64, 4, 1), Tile(64, 32, 128, 4, 1)),
}
ATTENTION_NARROW = 64
ATTENTION_DISTANCES = Tile(32, 32, 16, 4, 1)  # k: how many distances of a bias one program adds up


def cdiv(size: int, block: int) -> int:
    """Returns how many blocks cover `size`; `triton.cdiv` takes 4 µs where it is called from Python."""
    return -(-size // block)


@functools.cache
def device_class(device: torch.device) -> str:
    """Returns the key of the tables above."""
    if device.type != "cuda":
        return "interpreter"
    return class_of(torch.cuda.get_device_capability(device)).name


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a card, 4 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def key(x: torch.Tensor) -> str:
    """Returns the key of the tables above for a dtype: fp32, and fp16 on sm_75, have the same tiles on every card."""
    kind = device_class(x.device)
    return "fp32" if kind == "sm75" or (x.dtype == torch.float32 and kind != "interpreter") else kind


def elementwise_tile(x: torch.Tensor) -> ElementwiseTile:
    """Returns a tile with 16 elements a thread: two loads of 16 bytes each, in 16 bit."""
    return ElementwiseTile(2, 32, 4) if device_class(x.device) == "interpreter" else ElementwiseTile(4, 512, 4)


def takes_rows_alone(x: torch.Tensor, inner: int) -> bool:
    """Returns whether each row of x passes over a quantized weight (N, inner) for itself."""
    return inner % 64 == 0 and x.shape[0] <= QUANTIZED_VECTOR_ROWS


def quantized_row(inner: int) -> Tile:
    """Returns a tile of n rows of Ŵ and k of their columns: all of them, up to 4096."""
    k = min(max(64, 1 << (inner - 1).bit_length()), QUANTIZED_ROW_VALUES)
    return Tile(1, QUANTIZED_ROW_VALUES // k, k, 4, 1)


def dequantizes_in_loop(x: torch.Tensor, inner: int, storage: str) -> bool:
    """Returns whether the product of x with a quantized weight (N, inner) dequantizes it in the main loop."""
    rows = QUANTIZED_LOOP_ROWS_SM75 if device_class(x.device) == "sm75" else QUANTIZED_LOOP_ROWS[storage]
    return inner % 64 == 0 and x.shape[0] <= rows


def quantized_tile(x: torch.Tensor, rows: int) -> Tile:
    tile = QUANTIZED[key(x)]
    return tile._replace(m=padded(rows, tile.m))


def quantized_tile_length(x: torch.Tensor, length: int, width: int) -> int:
    """Returns how much of a weight's dimension is dequantized at a time, `width` numbers of x's dtype wide.

    The tiles have about equal length, and begin at multiples of 64 where that fits.
    """
    limit = INTERPRETER_QUANTIZED_TILE_BYTES if device_class(x.device) == "interpreter" else CUDA_TILE_BYTES
    most = max(1, limit // max(1, width * x.element_size()))
    most = most // 64 * 64 or most
    size = -(-length // max(1, -(-length // most)))
    return max(1, min(-(-size // 64) * 64, most))


def inner_splits(x: torch.Tensor, tile: Tile, programs: int, summed: int) -> int:
    """Returns the parts of a product's summed dimension: two programs for each multiprocessor, but four steps in each
    part, or two where rows are few and little but the weight is read."""
    wanted = -(-2 * processors(x.device) // programs)
    return max(1, min(wanted, summed // ((2 if tile.m == 16 else 4) * tile.k)))


def adapter_tile(x: torch.Tensor, rows: int, width: int) -> Tile:
    """Returns the tile for accumulators of `width` columns in all; fewer rows where some multiprocessors would idle."""
    tile = ADAPTER[key(x)][width > ADAPTER_NARROW]
    while tile.m > 16 and -(-rows // tile.m) < 0.75 * processors(x.device):
        tile = tile._replace(m=tile.m // 2, warps=4)
    return tile


def adapter_is_fused(x: torch.Tensor, bottleneck: int) -> bool:
    return bottleneck <= ADAPTER_FUSED[key(x)]


def latent_tile(x: torch.Tensor) -> ElementwiseTile:
    """Returns a tile of as many elements as ``elementwise_tile``, with the columns of a bottleneck, 512 at most."""
    tile = elementwise_tile(x)
    columns = min(tile.n, padded(x.shape[1], tile.n))
    return ElementwiseTile(tile.m * tile.n // columns, columns, tile.warps)


def attention_key(q: torch.Tensor) -> str:
    """Returns the key of attention's tables: on sm_75 operands in fp16 take more registers than fp32's tiles have."""
    return "sm75" if device_class(q.device) == "sm75" else key(q)


def attention_tile(table: dict[str, tuple[Tile, Tile]], q: torch.Tensor, dropout: float, distances: bool) -> Tile:
    """Returns the tile of `table` for q, smaller where other operands need registers as well.

    A bias by distance leaves room for fewer queries in backward, in fp32 and beside wide heads. With dropout a tile has
    fewer keys beside such a bias, and on cards that hold operands in registers; on sm_100 fewer queries.
    """
    kind, wide = attention_key(q), q.shape[3] > ATTENTION_NARROW
    tile = table[kind][wide]
    if dropout and (distances or kind in ("sm80", "small")):
        tile = tile._replace(n=32)
    if dropout and distances and kind == "sm100":
        tile = tile._replace(m=tile.m // 2)
    plain = kind == "sm75" or q.dtype == torch.float32
    if distances and table is ATTENTION_BACKWARD and (wide or plain):
        tile = tile._replace(m=min(tile.m, 16 if plain else 32))
    return tile


def attention_distances_tile(q: torch.Tensor) -> Tile:
    """Returns the tile for the gradient of a bias by distance: with 4 warps it has too few registers on sm_75."""
    return ATTENTION_DISTANCES._replace(warps=8) if attention_key(q) == "sm75" else ATTENTION_DISTANCES


def attention_sentence_tile(q: torch.Tensor, sentences: int, packed: bool) -> Tile | None:
    """Returns the tile for gradients of whole sentences, None where they are too long (in packed rows, on the average).

    Wide heads in packed rows have no registers for the sentences that are longer.
    """
    wide, tokens = q.shape[3] > ATTENTION_NARROW, q.shape[0] * q.shape[2]
    tile = ATTENTION_SENTENCE.get(key(q), (None, None))[wide]
    if tile is None or (packed and wide):
        return None
    if tile.m == 128 and not wide and tokens <= sentences * 64:
        tile = tile._replace(m=64, warps=4)
    return tile if tokens <= sentences * tile.m else None


def padded(size: int, largest: int) -> int:
    """Returns a block for `size` ranks: a power of two, at least 16 for a matrix instruction, at most `largest`."""
    return min(max(16, 1 << (size - 1).bit_length()), largest)


def alignment(ranks: tuple[int, ...]) -> int:
    """Returns the largest power of two, up to 16, that divides every rank (and stride), for loads along ranks."""
    return math.gcd(16, *ranks)


def rank_columns(x: torch.Tensor, dropout: float) -> int:
    """Returns how many columns are made at a time from s or ds of a block of rows; a mask takes registers, too."""
    if key(x) in ("interpreter", "fp32"):
        return 32
    return 64 if dropout else 128


def splits(x: torch.Tensor, tile: Tile, programs: int) -> int:
    """Returns the parts of a sum over x's tokens: two programs for each multiprocessor, but four steps in each part."""
    tokens = x.numel() // x.shape[-1]
    wanted = -(-2 * processors(x.device) // programs)
    return max(1, min(wanted, -(-tokens // (4 * tile.k))))


def gradient_parts(x: torch.Tensor, blocks: int) -> int:
    """Returns the parts of a sum over `blocks` of GRADIENTS' tokens; part i has blocks i, i + parts, i + 2 parts, …"""
    interpreter = device_class(x.device) == "interpreter"
    return min(blocks, INTERPRETER_GRADIENT_PARTS if interpreter else CUDA_PARTS)


def sum_block(splits: int, elements: int) -> tuple[int, int]:
    """Returns (parts, elements) that a program adds at a time.

    Many parts of few elements are read side by side, since a program that read them one after the other would wait for
    memory as often.
    """
    few = elements < SUM_FEW
    return 64 if few and splits > 8 else 8, 64 if few else 256


def row_block(rows: torch.Tensor) -> tuple[int, int]:
    """Returns (columns of a step along a row, warps): 32 columns a thread, so that one warp has a row of 1024."""
    block = max(8, min(1 << (rows.shape[1] - 1).bit_length(), _widest_row(rows)))  # 8 share a number of a mask
    return block, max(1, block // 1024)


def whole_rows(rows: torch.Tensor) -> bool:
    """Returns whether one program holds a row."""
    return rows.shape[1] <= _widest_row(rows)


def row_programs(rows: torch.Tensor, sums: bool) -> tuple[tuple[int, int], Tile]:
    """Returns (grid, tile) for a pass over whole rows, or blocks of columns of longer ones: 8 or 16 columns a thread.

    With sums over the rows, two programs for each multiprocessor walk over them and copy a tile ahead of its use.
    """
    block = row_block(rows)[0]
    tile = Tile(max(1, min(4, 4096 // block)), block, 0, max(1, min(8, block // 256)), 1)
    blocks = cdiv(rows.shape[1], block)
    if device_class(rows.device) == "interpreter":
        tile = tile._replace(m=2)
    if not sums:
        return (cdiv(rows.shape[0], tile.m), blocks), tile
    return (min(cdiv(rows.shape[0], tile.m), ROW_PROGRAMS * processors(rows.device)), blocks), tile._replace(stages=2)


def _widest_row(rows: torch.Tensor) -> int:
    return 64 if device_class(rows.device) == "interpreter" else 4096


def chunk_rows(rows: torch.Tensor, hidden: int) -> int:
    """Returns how many rows of hidden values exist at a time, in chunks of equal length."""
    tokens = max(1, rows.shape[0])
    if device_class(rows.device) == "interpreter":
        return -(-tokens // -(-tokens // INTERPRETER_CHUNK_ROWS))
    return ffn_chunk_rows(tokens, hidden, rows.element_size(), "cuda")


def vocabulary_block(x: torch.Tensor) -> int:
    return 32 if key(x) == "interpreter" else VOCABULARY_BLOCK


def word_warps(words: int) -> int:
    """Returns the warps for a row of so many logits in registers: 32 a thread."""
    return max(1, min(16, words // 1024))
