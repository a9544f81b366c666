"""Kernels: one module a backend. Each registers its callables for the ops with ``petl_kernels.dispatch``.

The names of the router are importable from here as well.
"""

from __future__ import annotations

from petl_kernels.dispatch import (
    BACKENDS,
    active,
    available_backends,
    backend_of,
    default_order,
    kernel_of,
    load_error,
    register,
    serving,
    triton_interprets,
    turned_down,
    use,
)

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
