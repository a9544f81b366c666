"""Dropout from a seed: the mask is recomputed where it is needed and never stored.

The mask of rows of n elements: eight neighbours share a counter, and a row begins with one of its own. Element j of
row i gets 16 of the 128 bits that Philox4x32-7 makes of counter (i * ceil(n / 8) + j // 8, 0, 0, 0) and of the two
halves of the 64-bit seed as its key: of output (j % 8) // 2 the low half where j is even, else the high one. It is kept
where this number is at least p * 2^16, rounded, which makes p a multiple of 2^-16; kept elements are divided by the
share that is kept, so that the mean stays. A dropped element is 0, even where it was not finite. Rows are the
last dimension of a tensor. Triton's ``tl.randint4x(seed, counter, 7)`` gives the same outputs.

Attention's probabilities have another order (``place``). Tensor cores leave a thread pairs of columns that lie 8 apart:
of 32 columns it then holds the 8 of one counter.

``draw_seed`` is the one place where seeds are drawn. Code that runs a forward pass again to save memory records the
seeds of the first run and replays them in the second: the masks are the same then, whatever the generator did in
between.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox; seven rounds are the fewest that
passed BigCrush).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.ops.checks import check_device, shape

MAX_ELEMENTS = 2**32
LEVELS = 2**16
SHARED = 8  # elements of a counter
GROUP = 32  # probabilities among which places are swapped; their counters are four
RATES = "0, or a number that is 1 to 65535 when rounded to 1 / 65536"
_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 18  # counters


class _Tapes(threading.local):
    """The open blocks of this thread, innermost last: a list records, an iterator replays."""

    def __init__(self):
        self.open: list[list[Tensor] | Iterator[Tensor]] = []


_tapes = _Tapes()


@contextmanager
def recording() -> Generator[list[Tensor]]:
    """Opens a block, and yields the list of seeds that this thread draws in it, in order, nested blocks included."""
    seeds: list[Tensor] = []
    with _opened(seeds):
        yield seeds


@contextmanager
def replaying(seeds: Sequence[Tensor]) -> Generator[None]:
    """Opens a block in which draws return ``seeds`` in order; recordings around it do not get them.

    Raises RuntimeError when the block draws more seeds than were recorded.
    """
    with _opened(iter(tuple(seeds))):
        yield


@contextmanager
def _opened(tape: list[Tensor] | Iterator[Tensor]) -> Generator[None]:
    _tapes.open.append(tape)
    try:
        yield
    finally:
        _tapes.open.pop()


def draw_seed(device: torch.device) -> Tensor:
    """Returns a seed from PyTorch's generator, drawn on the device so that nothing waits, or the next one replayed."""
    recordings: list[list[Tensor]] = []
    for tape in reversed(_tapes.open):
        if not isinstance(tape, list):
            seed = next(tape, None)
            if seed is None:
                raise RuntimeError(
                    "dropout draws more seeds than were recorded: the block does not repeat its first run"
                )
            break
        recordings.append(tape)
    else:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    for seeds in recordings:
        seeds.append(seed)
    return seed


def seed_for(op: str, x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """Returns the seed with which ``op`` drops elements of x: the one given, a new one, or None when p is 0.

    Raises InputError: p that ``check_rate`` refuses, more elements than the stream has, a seed of another shape, dtype
    or device.
    """
    check_rate(op, p)
    if p and x.numel() >= MAX_ELEMENTS:
        raise InputError(f"{op}: x has {x.numel()} elements: expected fewer than 2^32 with dropout")
    check_seed(op, seed, x)
    if p == 0:
        return None
    return draw_seed(x.device) if seed is None else seed


def check_seed(op: str, seed: Tensor | None, x: Tensor) -> None:
    """Refuses a seed that is not int64 (1,) on the device of x."""
    if seed is not None:
        if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
            raise InputError(f"{op}: seed is {seed.dtype} of shape {shape(seed)}: expected int64 of shape (1,)")
        check_device(op, "seed", seed, x)


def check_rate(op: str, p: float) -> None:
    """Raises InputError: p outside [0, 1), or so near to either end that no mask of 2^-16 steps could have it."""
    if not 0 <= p < 1:
        raise InputError(f"{op}: dropout is {p}: expected a number in [0, 1)")
    if not has_mask(p):
        raise InputError(f"{op}: dropout is {p}: expected {RATES}")


def has_mask(p: float) -> bool:
    """Returns whether some mask drops this share: none does at rates very near to 0 or 1."""
    return p == 0 or 0 < threshold(p) < LEVELS


def threshold(p: float) -> int:
    """Returns the smallest 16-bit number whose element is kept."""
    return round(p * LEVELS)


def keep_scale(p: float) -> float:
    """Returns the factor of kept elements: the reciprocal of the share that is kept."""
    return LEVELS / (LEVELS - threshold(p))


def philox(seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four 32-bit outputs for counter (index, 0, 0, 0), as int64 tensors of index' shape."""
    zero = torch.zeros_like(index)
    return rounds((index, zero, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))


def rounds(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns Philox4x32-7 of 32-bit numbers in int64 tensors."""
    # int64 products wrap around, which leaves the bit pattern of the unsigned product.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(right) ^ c1 ^ k0, right & _LOW, _high(left) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _LOW


@torch.no_grad()
def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, first: int = 0) -> Tensor:
    """Returns which elements of the rows from ``first`` on stay: bools of ``shape``, whose last dimension is a row."""
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    if keep.numel() == 0:
        return keep
    rows, a_row = keep.view(-1, keep.shape[-1]), -(-keep.shape[-1] // SHARED)
    step = max(1, _CHUNK // a_row)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        counters = torch.arange(part.shape[0] * a_row, device=seed.device) + (first + start) * a_row
        numbers = _halves(philox(seed, counters)).view(part.shape[0], -1)
        part.copy_(numbers[:, : part.shape[1]] >= threshold(p))
    return keep


@torch.no_grad()
def keep_elements(seed: Tensor, rows: Tensor, columns: Tensor, length: int, p: float) -> Tensor:
    """Returns which elements at ``columns`` (n,) of ``rows`` (any shape) stay: bools (*rows.shape, n).

    A row has ``length`` elements; rows and columns are int64.
    """
    counters = (rows[..., None] * -(-length // SHARED) + columns // SHARED).view(-1)
    places = (columns % SHARED).expand(*rows.shape, columns.shape[0]).reshape(-1)
    keep = torch.empty(counters.shape, dtype=torch.bool, device=seed.device)
    for first in range(0, counters.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        numbers = _halves(philox(seed, counters[part])).gather(1, places[part, None])
        keep[part] = numbers[:, 0] >= threshold(p)
    return keep.view(*rows.shape, columns.shape[0])


def place(columns: Tensor) -> Tensor:
    """Returns the places in a row of the mask that hold the numbers of the probabilities of ``columns``.

    Column 32 a + 8 b + 2 c + d is in place 32 a + 8 c + 2 b + d: it has the counter of its pair and the word of its 8.
    """
    return (columns & ~30) | (columns & 6) << 2 | (columns & 24) >> 2


def _halves(outputs: tuple[Tensor, ...]) -> Tensor:
    """Returns (n, 8) numbers of 16 bits from four (n,) of 32."""
    words = torch.stack(outputs, -1)
    return torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten(-2)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Returns drop(x) of a (tokens, features) tensor. It is its own derivative: dropout(dy) is the gradient."""
    if p == 0:
        return x
    assert seed is not None
    return torch.where(keep_mask(seed, tuple(x.shape), p), x * keep_scale(p), 0)
