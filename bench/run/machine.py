"""A machine in the words of a result: its processor, and the versions of what ran on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "cut-cross-entropy")


def described(device: str, cpu: str | None = None) -> dict:
    """Returns versions, and the processor that does the work: "device" is "cpu" or the card's name.

    cpu: the processor's name, by cpuinfo where it is not given.
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_name": cpu or _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        **{name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
