"""The C++ kernels for the CPU (``csrc/cpu``): those of the reference's names that the extension has."""

from __future__ import annotations

import platform

import torch

import petl_kernels.ops  # noqa: F401  registers the reference
from petl_kernels.dispatch import register, registered
from petl_kernels.extension import load_extension

# The extension is compiled for AVX2 on x86-64; loading it on an older processor would end the process.
if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    raise ImportError("this processor has no AVX2")
load_extension()

for _name in registered("reference"):
    if hasattr(torch.ops.petl_cpu, _name):
        register(_name, "cpu")(getattr(torch.ops.petl_cpu, _name).default)
