"""The machine that this process runs on: processor, memory, devices and the versions that are installed."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch


def processor() -> str:
    """Returns the processor's name, as far as the system gives one."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int | None:
    """Returns the number of logical processors of the machine; None where the system does not tell."""
    return os.cpu_count()


def threads() -> int:
    """Returns the number of threads that PyTorch's and this package's CPU kernels use."""
    return torch.get_num_threads()


def total_bytes() -> int:
    """Returns the bytes of host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int | None:
    """Returns the bytes of host memory that processes may still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(found, None)


def device_name(kind: str) -> str:
    """Returns the name of a kind of device: "cpu", or the name of the current card."""
    return torch.cuda.get_device_name() if kind == "cuda" else "cpu"


def version(package: str) -> str | None:
    """Returns the installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
