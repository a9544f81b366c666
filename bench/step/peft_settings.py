"""PEFT's settings, and the search for the fastest that fits.

A setting is a storage of the base, gradient checkpointing, the dtype of the adapters and torch.compile. Each is tried
at the largest micro-batch that it has room for: halves of an update, down to one sentence of the longest kind.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

BASES = ("bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class Setting:
    base: str
    checkpointing: bool = False
    fp32_adapters: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        words = [f"{self.base} base", f"{'fp32' if self.fp32_adapters else 'bf16'} adapters"]
        words += ["checkpointing"] if self.checkpointing else []
        return ", ".join(words + (["torch.compile"] if self.compiled else []))


@dataclass(frozen=True)
class Tried:
    setting: Setting
    micro_tokens: int
    result: Any

    @property
    def fits(self) -> bool:
        return not self.result.failure

    @property
    def seconds(self) -> float:
        return statistics.median(self.result.seconds)


# (setting, padded tokens of a micro-batch) -> a result with `failure`, `out_of_memory` and `seconds`
Run = Callable[[Setting, int], Any]


def halves(batch_tokens: int, longest: int) -> list[int]:
    """Tokens of a micro-batch: the whole update, its half, ..., one sentence of ``longest`` tokens."""
    sizes = [batch_tokens]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    return sizes


def largest_that_fits(setting: Setting, run: Run, sizes: Sequence[int]) -> list[Tried]:
    """Returns the trials of ``sizes`` (falling), of which the last that fits is the largest; none may fit.

    A failure that is not about memory would meet smaller micro-batches, too, and ends the search.
    """
    tried = []

    def fits(index: int) -> bool | None:
        result = run(setting, sizes[index])
        tried.append(Tried(setting, sizes[index], result))
        return True if not result.failure else False if result.out_of_memory else None

    if fits(0) is not False:
        return tried
    too_large, small = 0, len(sizes) - 1
    if small == 0 or not fits(small):
        return tried
    while small - too_large > 1:
        middle = (small + too_large) // 2
        found = fits(middle)
        if found is None:
            return tried
        small, too_large = (middle, too_large) if found else (small, middle)
    return tried


def search(run: Run, sizes: Sequence[int], every: bool = False, compiled: bool = True) -> list[Tried]:
    """All that was tried. ``every``: the whole grid; else one after the other, as far as there is something to win.

    In short form checkpointing is tried where a base does not fit without it in one piece, and a rounded base where
    the plain one does not: both only make room, and cost time. Adapters in fp32 and torch.compile are tried on the
    fastest setting. ``compiled`` False leaves torch.compile out of the short form.
    """
    if every:
        flags = (False, True)
        grid = (Setting(*levers) for levers in itertools.product(BASES, flags, flags, flags))
        return [tried for setting in grid for tried in largest_that_fits(setting, run, sizes)]
    tried: list[Tried] = []
    for base, checkpointing in itertools.product(BASES, (False, True)):
        if any(t.fits and t.micro_tokens == sizes[0] and t.setting.base in (base, BASES[0]) for t in tried):
            continue
        tried += largest_that_fits(Setting(base, checkpointing), run, sizes)
    fastest = best(tried)
    if fastest is not None:
        smaller = [size for size in sizes if size <= fastest.micro_tokens]
        changes = [{"fp32_adapters": True}] + [{"compiled": True}] * compiled
        for change in changes:
            tried += largest_that_fits(replace(fastest.setting, **change), run, smaller)
    return tried


def best(tried: Sequence[Tried]) -> Tried | None:
    return min((t for t in tried if t.fits), key=lambda t: t.seconds, default=None)


def why_none(tried: Sequence[Tried]) -> str:
    """In one line why nothing of ``tried`` fits: each reason with how often it was met."""
    reasons = [t.result.failure for t in tried]
    counted = {reason: reasons.count(reason) for reason in reasons}
    return "; ".join(f"{reason} ({count} of {len(reasons)} trials)" for reason, count in counted.items())
