"""Kernels: one module a backend. Each registers its callables for the ops with ``petl_kernels.dispatch``.

Importing this package hands the router its first-use check, before any backend is there: ``parity.check``, in the
dtypes that kernels are checked in. The names of the router are importable from here as well.
"""

from __future__ import annotations

import torch

import petl_kernels.parity as parity
from petl_kernels.dispatch import (
    BACKENDS,
    active,
    available_backends,
    backend_of,
    check_first_use_with,
    default_order,
    kernel_of,
    load_error,
    register,
    serving,
    triton_interprets,
    turned_down,
    use,
)


def _check(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return parity.check(op, backend, device, dtype) if dtype in parity.DTYPES else None


check_first_use_with(_check)

__all__ = [
    "BACKENDS",
    "active",
    "available_backends",
    "backend_of",
    "default_order",
    "kernel_of",
    "load_error",
    "register",
    "serving",
    "triton_interprets",
    "turned_down",
    "use",
]
