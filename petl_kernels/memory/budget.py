"""How large a micro-batch may be so that a training step stays inside a budget of bytes.

Measured, not modelled: the worst batch shape of the run is tried at growing sizes before training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.memory.peak import peak_bytes
from petl_kernels.memory.size import format_size

# Allocators round up and fragment: this share of the budget stays free.
SLACK = 0.1


@dataclass(frozen=True)
class Fit:
    """A micro-batch that fits: its tokens, how many of them make an update, and the peak that was measured."""

    micro_tokens: int
    accumulate: int
    peak_bytes: int


def fit_micro_batch(
    step: Callable[[int], None],
    living: Callable[[], Iterable[Tensor]],
    optimizer_bytes: int,
    memory: int,
    batch_tokens: int,
    longest: int,
    device: torch.device,
) -> Fit:
    """Split ``batch_tokens`` into the fewest equal micro-batches whose step stays under ``memory`` bytes.

    ``step(sentences)`` runs forward and backward over that many sentences of ``longest`` tokens, the worst shape of
    the run; ``living`` gives the tensors that exist before it; ``optimizer_bytes`` is state that a first update will
    create. Raises InputError, with the least budget that works, when not even one sentence fits.
    """
    peaks: dict[int, float] = {}

    def peak(sentences: int) -> float:
        if sentences not in peaks:
            try:
                peaks[sentences] = peak_bytes(lambda: step(sentences), living(), device) + optimizer_bytes
            except torch.OutOfMemoryError:
                peaks[sentences] = float("inf")
        return peaks[sentences]

    usable = memory * (1 - SLACK)
    step(1)  # gradients are allocated now and stay
    if peak(1) > usable:
        raise InputError(
            f"memory {format_size(memory)}: a step on one sentence of {longest} tokens needs "
            f"{format_size(round(peak(1) / (1 - SLACK)))}; expected at least that, or shorter sentences (--max-length)"
        )
    wanted = max(1, batch_tokens // longest)
    fits = _largest(lambda sentences: peak(sentences) <= usable, wanted)
    accumulate = -(-wanted // fits)
    micro = -(-wanted // accumulate)
    return Fit(max(longest, batch_tokens // accumulate), accumulate, round(peak(micro)))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in [1, most] that fits, given that 1 does and that what fits is an unbroken range."""
    good = 1
    while good < most and fits(min(2 * good, most)):
        good = min(2 * good, most)
    bad = min(2 * good, most) if good < most else most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def cap_device(memory: int, device: torch.device) -> None:
    """Make the CUDA allocator refuse to go over ``memory`` bytes; a CPU has no such cap.

    Raises InputError when the device has less than that.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if memory > total:
        raise InputError(f"memory {format_size(memory)}: the device has {format_size(total)}; expected at most that")
    torch.cuda.set_per_process_memory_fraction(memory / total, device)
