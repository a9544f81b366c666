"""Bytes: of a machine's caches, and those that a call takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def cache_bytes(device: str) -> int:
    """Returns the bytes of a GPU's L2 cache or a CPU's last cache (32 MiB where the system names none)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def peak_memory(run: Callable, device: str) -> int:
    """Returns the most bytes that ``run`` takes beside what is there, by a GPU's allocator or the process on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or what an earlier run has freed would serve this one, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # forgets the process' peak
    before = _process_bytes("VmRSS")
    run()
    return _process_bytes("VmHWM") - before


def _process_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
