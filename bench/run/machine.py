"""A machine in the words of a result: its processor, and the versions of what ran on it."""

from __future__ import annotations

import platform

import torch

from petl_kernels import machine

PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "cut-cross-entropy")


def described(device: str, cpu: str | None = None) -> dict:
    """Returns versions, and the processor that does the work: "device" is "cpu" or the card's name.

    cpu: the processor's name, by cpuinfo where it is not given.
    """
    return {
        "device": machine.device_name(device),
        "cpu_name": cpu or _processor(),
        "cores": machine.cores(),
        "threads": machine.threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        **{name: machine.version(name) for name in PACKAGES},
    }


def _processor() -> str:
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
