"""A limit on tensor memory that the allocator enforces: an allocation beyond it raises torch.OutOfMemoryError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.extension import find_extension
from petl_kernels.units import format_size


@contextmanager
def capped(memory: int | None, device: torch.device) -> Iterator[None]:
    """Limits this process to ``memory`` bytes of ``device`` within the block; None is no limit.

    On CUDA the limit holds for the caching allocator, to which the budget leaves what CUDA's own context does not take.
    On the CPU it holds for what is allocated from the block's start on, in all threads; without the C++ extension there
    is no limit there. Raises InputError when the device has less.
    """
    if memory is None:
        yield
        return
    device = resolve(device)
    limit = _limit_cuda if device.type == "cuda" else _limit_cpu
    limit(memory, device)
    try:
        yield
    finally:
        limit(None, device)


def expand_segments() -> None:
    """Makes CUDA's allocator grow its segments, so that blocks of many sizes leave no holes.

    To be called before the allocator makes its first segment; nothing is done after that, nor where the user has
    settings of the allocator. ``capped`` holds for such segments too: the allocator counts the memory that it maps.
    """
    given = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if torch.cuda.is_available() and not torch.cuda.is_initialized() and not given:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when the allocator is first used


def reset_peak(device: torch.device) -> None:
    """Starts ``peak`` and ``held_peak`` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (extension := find_extension()) is not None:
        extension.reset_cpu_peak()


def peak(device: torch.device) -> int:
    """Returns the most bytes of tensors since ``reset_peak``; on the CPU of those that were made inside ``capped``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    extension = find_extension()
    return 0 if extension is None else extension.cpu_peak()


def count(device: torch.device) -> int | None:
    """Starts to count what the allocator of ``device`` gives, with or without a limit.

    Returns the bytes to subtract from ``held_peak`` to have those that a budget counts: on the CPU the bytes of tensors
    that live already; on CUDA minus those of the context. None where nothing counts.
    """
    device = resolve(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        reset_peak(device)
        return -context_bytes(device)
    extension = find_extension()
    if extension is None:
        return None
    extension.install_cpu_allocator()
    reset_peak(device)
    return extension.cpu_bytes()


def held_peak(device: torch.device) -> int:
    """Returns the most bytes that the allocator held since ``reset_peak``, which ``capped`` limits.

    On CUDA its free blocks are part of them.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak(device)


def context_bytes(device: torch.device) -> int:
    """Returns the bytes that are used on the card outside of the allocator: CUDA's own, and other processes'."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def check_memory(memory: int, device: torch.device) -> None:
    """Raises InputError where a budget of ``memory`` bytes is above what a CUDA device has."""
    total = torch.cuda.get_device_properties(device).total_memory
    if memory > total:
        raise InputError(f"memory {format_size(memory)}: the device has {format_size(total)}; expected at most that")


def _limit_cuda(memory: int | None, device: torch.device) -> None:
    if memory is None:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    check_memory(memory, device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0, memory - context_bytes(device)) / total, device)


def _limit_cpu(memory: int | None, device: torch.device) -> None:
    extension = find_extension()
    if extension is None:
        return
    extension.install_cpu_allocator()
    extension.limit_cpu_bytes(0 if memory is None else memory + extension.cpu_bytes())
