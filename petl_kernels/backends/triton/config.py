"""Block shapes, warps and pipeline depths: fixed per device class, input width and problem size, never autotuned.

Autotuning runs kernels with whatever memory they take, which a memory budget forbids, and picks differently from
run to run. Device classes differ in the shared memory that a block may use: sm_80 163 KB, sm_90 and sm_100 227 KB,
and "small" for every other card (99 KB on sm_86, sm_89 and sm_120). "interpreter" holds tiles small enough that
tests meet several.

None of these numbers has been tuned on a card yet. They are the usual ones for each architecture, kept where the
compiler reports no spilled registers and the shared memory fits (tests/backends/test_triton_aot.py).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

SUM_BLOCK = 256
MAX_GROUPS = 3  # linears in one launch: q, k and v
TILE_GROUP = 8  # rows of tiles that are walked together, see common.swizzle


class Tile(NamedTuple):
    m: int  # rows: tokens, except in sums over tokens, where these are columns of the activation
    n: int  # columns of the result
    k: int  # length of one step along the summed dimension
    warps: int
    stages: int


MATMUL = {
    "small": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 4)),
    "sm80": (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 4, 4), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    "sm90": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    "sm100": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    "fp32": (Tile(64, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
    "interpreter": (Tile(32, 32, 32, 4, 1),),
}
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
# Widest accumulators in all (the bottleneck; twice that in backward) for which a block of rows stays fused.
ADAPTER_LIMIT = {"small": 128, "sm80": 256, "sm90": 256, "sm100": 256, "fp32": 64, "interpreter": 64}

# Work without a product: m rows (k at a time, in sums over them) by n columns.
POINTWISE = Tile(16, 128, 16, 4, 2)
# The hidden values of a feed-forward network that exist at a time, and the fewest rows of them: 4,096 rows at f = 4096.
# A chunk's product of d = 1024 columns has 256 tiles then, two for each of 132 multiprocessors; at 8 MB it had 64.
CHUNK_BYTES, CHUNK_ROWS = 32 << 20, 256
INTERPRETER_CHUNK_ROWS = 48

# Products with a quantised weight Ŵ. Up to so many rows it is dequantised in the main loop, again for each tile of
# rows; above, tiles of at most QUANTISED_TILE_BYTES are, once, ahead of the library's product (bench/NOTES.md).
QUANTISED = {
    "small": Tile(128, 64, 64, 4, 3),
    "sm80": Tile(128, 64, 64, 4, 3),
    "sm90": Tile(128, 64, 64, 4, 4),
    "sm100": Tile(128, 64, 64, 4, 4),
    "fp32": Tile(32, 64, 32, 4, 2),
    "interpreter": Tile(32, 32, 32, 4, 1),
}
QUANTISED_LOOP_ROWS = {"int8": 512, "nf4": 256}
QUANTISED_TILE_BYTES = 32 << 20
INTERPRETER_QUANTISED_TILE_BYTES = 8 << 10
DEQUANTISE = Tile(8, 256, 0, 4, 1)


class ElementwiseTile(NamedTuple):
    m: int  # rows
    n: int  # columns
    warps: int

    def grid(self, x: torch.Tensor) -> tuple[int, int]:
        return -(-x.shape[0] // self.m), -(-x.shape[1] // self.n)


# The words that one program of the vocabulary loss holds in registers: 16 a thread.
VOCABULARY_BLOCK = 4096
VOCABULARY_WARPS = 8
# Attention: blocks of m queries and n keys; the second entry serves more than ATTENTION_NARROW features.
ATTENTION_FORWARD = {
    "small": (Tile(64, 64, 64, 4, 2), Tile(64, 32, 128, 4, 2)),
    "sm80": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "sm90": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "sm100": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 128, 8, 2)),
    "fp32": (Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
    "interpreter": (Tile(16, 32, 64, 4, 1), Tile(16, 32, 128, 4, 1)),
}
ATTENTION_BACKWARD = {
    "small": (Tile(32, 64, 64, 4, 2), Tile(32, 32, 128, 4, 2)),
    "sm80": (Tile(64, 64, 64, 8, 3), Tile(64, 64, 128, 8, 2)),
    "sm90": (Tile(64, 64, 64, 4, 3), Tile(64, 64, 128, 8, 3)),
    "sm100": (Tile(64, 64, 64, 4, 3), Tile(64, 64, 128, 8, 2)),
    "fp32": (Tile(32, 32, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
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
    """How many blocks cover `size`; `triton.cdiv` takes 4 µs where it is called from Python."""
    return -(-size // block)


@functools.cache
def device_class(device: torch.device) -> str:
    """The key of the tables above."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get((major, minor), "small")


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def key(x: torch.Tensor) -> str:
    """The key of the tables above: fp32 has smaller tiles, the same on every card."""
    kind = device_class(x.device)
    return "fp32" if x.dtype == torch.float32 and kind != "interpreter" else kind


def elementwise_tile(x: torch.Tensor) -> ElementwiseTile:
    """16 elements a thread: two loads of 16 bytes each, in 16 bit."""
    return ElementwiseTile(2, 32, 4) if device_class(x.device) == "interpreter" else ElementwiseTile(4, 512, 4)


def matmul_tile(x: torch.Tensor, rows: int, cols: int, elements: int = 128) -> Tile:
    """The largest tile that still fills three quarters of the multiprocessors; the smallest when none does.

    elements: how many of the accumulator a thread may hold, below 128 where a kernel needs registers beside it.
    """
    ladder = [t for t in MATMUL[key(x)] if t.n <= 128 or elements >= 128]
    wanted = 0.75 * processors(x.device)
    tile = next((t for t in ladder if -(-rows // t.m) * -(-cols // t.n) >= wanted), ladder[-1])
    while tile.m * tile.n > 32 * tile.warps * elements:
        tile = tile._replace(warps=8) if tile.warps < 8 else tile._replace(m=tile.m // 2)
    return tile


def dequantises_in_loop(x: torch.Tensor, inner: int, storage: str) -> bool:
    """Whether the product of the rows of x with a quantised weight (N, inner) dequantises it in the main loop."""
    return inner % 64 == 0 and x.shape[0] <= QUANTISED_LOOP_ROWS[storage]


def quantised_tile(x: torch.Tensor, rows: int) -> Tile:
    tile = QUANTISED[key(x)]
    return tile._replace(m=padded(rows, tile.m))


def quantised_tile_length(x: torch.Tensor, length: int, width: int) -> int:
    """How much of a weight's dimension is dequantised at a time, `width` numbers of x's dtype wide.

    Tiles of about equal length, which begin at multiples of 64 where that fits.
    """
    limit = INTERPRETER_QUANTISED_TILE_BYTES if device_class(x.device) == "interpreter" else QUANTISED_TILE_BYTES
    most = max(1, limit // max(1, width * x.element_size()))
    most = most // 64 * 64 or most
    size = -(-length // max(1, -(-length // most)))
    return max(1, min(-(-size // 64) * 64, most))


def inner_splits(x: torch.Tensor, tile: Tile, programs: int, summed: int) -> int:
    """Parts of a product's summed dimension: two programs for each multiprocessor, but four steps in each part."""
    wanted = -(-2 * processors(x.device) // programs)
    return max(1, min(wanted, summed // (4 * tile.k)))


def adapter_tile(x: torch.Tensor, rows: int, width: int) -> Tile:
    """The tile for accumulators of `width` columns in all; fewer rows where some multiprocessors would idle."""
    tile = ADAPTER[key(x)][width > ADAPTER_NARROW]
    while tile.m > 16 and -(-rows // tile.m) < 0.75 * processors(x.device):
        tile = tile._replace(m=tile.m // 2, warps=4)
    return tile


def attention_tile(table: dict[str, tuple[Tile, Tile]], q: torch.Tensor, dropout: float, distances: bool) -> Tile:
    """Fewer queries with a bias by distance in fp32 or beside wide heads, in backward: its places in the table need
    registers too. With dropout fewer keys beside it, and where operands are in registers; on sm_100 fewer queries.
    """
    kind, wide = key(q), q.shape[3] > ATTENTION_NARROW
    tile = table[kind][wide]
    if dropout and (distances or kind in ("sm80", "small")):
        tile = tile._replace(n=32)
    if dropout and distances and kind == "sm100":
        tile = tile._replace(m=tile.m // 2)
    if distances and table is ATTENTION_BACKWARD and (wide or q.dtype == torch.float32):
        tile = tile._replace(m=min(tile.m, 16 if q.dtype == torch.float32 else 32))
    return tile


def attention_sentence_tile(q: torch.Tensor, sentences: int, packed: bool) -> Tile | None:
    """For gradients of whole sentences at once; None where these are too long for it, in a packed row on the average.

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
    """A block for `size` ranks: a power of two, at least the 16 that a matrix instruction takes, at most `largest`."""
    return min(max(16, 1 << (size - 1).bit_length()), largest)


def alignment(ranks: tuple[int, ...]) -> int:
    """The largest power of two, up to 16, that divides every rank (and stride): how wide loads along ranks may be."""
    return math.gcd(16, *ranks)


def rank_block(x: torch.Tensor, ranks: tuple[int, ...], size: int) -> int:
    """A block of ranks beside a full accumulator: small where fp32 or unaligned ranks need more registers."""
    return padded(size, 64 if alignment(ranks) == 16 and x.dtype != torch.float32 else 16)


def splits(x: torch.Tensor, tile: Tile, programs: int) -> int:
    """Parts of a sum over x's tokens: two programs for each multiprocessor, but four steps in each part."""
    tokens = x.numel() // x.shape[-1]
    wanted = -(-2 * processors(x.device) // programs)
    return max(1, min(wanted, -(-tokens // (4 * tile.k))))


def pointwise_tile(x: torch.Tensor) -> Tile:
    return POINTWISE._replace(n=32) if device_class(x.device) == "interpreter" else POINTWISE


def row_block(rows: torch.Tensor) -> tuple[int, int]:
    """(columns in one step along a row, warps): 16 columns a thread at most, and 4096 in all."""
    block = min(1 << (rows.shape[1] - 1).bit_length(), 64 if device_class(rows.device) == "interpreter" else 4096)
    return block, max(1, min(8, block // 256))


def row_warps(rows: torch.Tensor) -> tuple[int, int] | None:
    """(columns of a block that holds a whole row, warps), 32 columns a thread; None where 4096 columns are too few."""
    block = max(8, 1 << (rows.shape[1] - 1).bit_length())
    if block > (64 if device_class(rows.device) == "interpreter" else 4096):
        return None
    return block, max(1, block // 1024)


def row_programs(rows: torch.Tensor, sums: bool) -> tuple[int, int, int]:
    """(programs, columns, warps) for a pass over whole rows, one a program.

    With sums over the rows four programs for each multiprocessor, which walk over them: each holds its part of the
    sums, so more warps share a row.
    """
    block, warps = row_warps(rows)
    if not sums:
        return rows.shape[0], block, warps
    return min(rows.shape[0], 4 * processors(rows.device)), block, max(1, min(8, block // 256))


def chunk_rows(rows: torch.Tensor, hidden: int) -> int:
    """How many rows a chunk has, in chunks of equal length."""
    most = max(CHUNK_ROWS, CHUNK_BYTES // (hidden * rows.element_size()))
    if device_class(rows.device) == "interpreter":
        most = INTERPRETER_CHUNK_ROWS
    tokens = max(1, rows.shape[0])
    return -(-tokens // -(-tokens // most))


def vocabulary_block(x: torch.Tensor) -> int:
    return 32 if key(x) == "interpreter" else VOCABULARY_BLOCK
