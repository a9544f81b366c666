"""A limit on tensor memory that the allocator enforces: over it, an allocation raises torch.OutOfMemoryError."""

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
    """Inside, this process cannot take more than ``memory`` bytes of ``device``; None is no limit.

    CUDA: of the caching allocator, the rest of the budget being CUDA's own context. CPU: of what is allocated from here
    on, in all threads; without the C++ extension there is no limit there. Raises InputError when the device has less.
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
    """Let CUDA's allocator grow its segments, before it makes the first: blocks of many sizes then leave no holes.

    The share of a process, which ``capped`` sets, holds for them too: the allocator counts the memory that it maps.
    A user's own settings stay, and nothing is done where CUDA is in use already.
    """
    given = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if torch.cuda.is_available() and not torch.cuda.is_initialized() and not given:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when the allocator is first used


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (extension := find_extension()) is not None:
        extension.reset_cpu_peak()


def peak(device: torch.device) -> int:
    """The most that tensors took since ``reset_peak``; on the CPU of those that were made inside ``capped``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    extension = find_extension()
    return 0 if extension is None else extension.cpu_peak()


def count(device: torch.device) -> int | None:
    """Count from here on what the allocator of ``device`` gives, with or without a limit.

    Returns what has to be taken off ``held_peak`` for the bytes that a budget counts: on the CPU those of tensors that
    live already; on CUDA nothing but, with its sign turned, CUDA's context. None where nothing counts.
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
    """The most that the allocator held since ``reset_peak``, which is what ``capped`` limits: on CUDA its free blocks
    are part of it."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak(device)


def context_bytes(device: torch.device) -> int:
    """What CUDA takes for itself: used on the card and not by the allocator. Whatever runs beside us counts too."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _limit_cuda(memory: int | None, device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    if memory is None:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    if memory > total:
        raise InputError(f"memory {format_size(memory)}: the device has {format_size(total)}; expected at most that")
    torch.cuda.set_per_process_memory_fraction(max(0, memory - context_bytes(device)) / total, device)


def _limit_cpu(memory: int | None, device: torch.device) -> None:
    extension = find_extension()
    if extension is None:
        return
    extension.install_cpu_allocator()
    extension.limit_cpu_bytes(0 if memory is None else memory + extension.cpu_bytes())
