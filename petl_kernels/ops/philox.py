"""Dropout from a seed: the mask is recomputed where it is needed and never stored.

Element i of the contiguous (tokens, features) view gets u_i, output i % 4 of Philox4x32-10 with counter
(i // 4, 0, 0, 0) and the two halves of the 64-bit seed as its key: one counter serves four elements. It is kept where
u_i >= floor(p * 2^32), and kept elements are scaled by 1 / (1 - p); what is dropped is 0, even where it was not finite.
Triton's ``tl.randint4x(seed, i // 4)`` gives the same stream.

``draw_seed`` is the one place where seeds are drawn. What runs a forward pass again to save memory records the seeds
of the first run and replays them in the second: the masks are the same then, whatever the generator did in between.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.ops.common import check_device, shape

MAX_ELEMENTS = 2**32
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 18  # counters


class _Tapes(threading.local):
    """The blocks that this thread is in, innermost last: a list records, an iterator replays."""

    def __init__(self):
        self.open: list[list[Tensor] | Iterator[Tensor]] = []


_tapes = _Tapes()


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """Every seed that this thread draws in the block, in order, also from recordings inside this one."""
    seeds: list[Tensor] = []
    with _opened(seeds):
        yield seeds


@contextmanager
def replaying(seeds: Sequence[Tensor]) -> Iterator[None]:
    """In this block draws return ``seeds`` in order; nothing outside it records them again.

    Raises RuntimeError when the block draws more seeds than were recorded.
    """
    with _opened(iter(tuple(seeds))):
        yield


@contextmanager
def _opened(tape: list[Tensor] | Iterator[Tensor]) -> Iterator[None]:
    _tapes.open.append(tape)
    try:
        yield
    finally:
        _tapes.open.pop()


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's generator, drawn on the device so that nothing waits for it; or the next one replayed."""
    recordings = []
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
    """The seed with which ``op`` drops elements of x: the one given, a new one, or None when p is 0.

    Raises InputError: p outside [0, 1), more elements than the stream has, a seed of another shape, dtype or device.
    """
    if not 0 <= p < 1:
        raise InputError(f"{op}: dropout is {p}: expected a number in [0, 1)")
    if p and x.numel() >= MAX_ELEMENTS:
        raise InputError(f"{op}: x has {x.numel()} elements: expected fewer than 2^32 with dropout")
    if seed is not None:
        if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
            raise InputError(f"{op}: seed is {seed.dtype} of shape {shape(seed)}: expected int64 of shape (1,)")
        check_device(op, "seed", seed, x)
    if p == 0:
        return None
    return draw_seed(x.device) if seed is None else seed


def philox(seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit outputs for counter (index, 0, 0, 0), as int64 tensors of index' shape."""
    # int64 products wrap around, which leaves the bit pattern of the unsigned product.
    c0, c1, c2, c3 = index, *(torch.zeros_like(index) for _ in range(3))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(right) ^ c1 ^ k0, right & _LOW, _high(left) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _LOW


def threshold(p: float) -> int:
    return int(p * 2**32)


@torch.no_grad()
def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, first: int = 0) -> Tensor:
    """Which of the elements from ``first`` on stay: a bool tensor of ``shape``."""
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    flat = keep.view(-1)
    for start in range(0, flat.shape[0], 4 * _CHUNK):
        part = flat[start : start + 4 * _CHUNK]
        skipped = (first + start) % 4
        counters = torch.arange((first + start) // 4, (first + start + part.shape[0] + 3) // 4, device=seed.device)
        outputs = torch.stack(philox(seed, counters), 1).view(-1)
        part.copy_(outputs[skipped : skipped + part.shape[0]] >= threshold(p))
    return keep


@torch.no_grad()
def keep_elements(seed: Tensor, index: Tensor, p: float) -> Tensor:
    """Which of the elements at ``index`` (int64, any shape) stay: a bool tensor of its shape."""
    keep = torch.empty(index.shape, dtype=torch.bool, device=seed.device)
    for part, at in zip(keep.view(-1).split(_CHUNK), index.reshape(-1).split(_CHUNK), strict=True):
        outputs = torch.stack(philox(seed, at // 4), 1)
        part.copy_(outputs.gather(1, (at % 4)[:, None])[:, 0] >= threshold(p))
    return keep


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(x) of a (tokens, features) tensor. It is its own derivative: dropout(dy) is the gradient."""
    if p == 0:
        return x
    return torch.where(keep_mask(seed, tuple(x.shape), p), x * (1 / (1 - p)), 0)
