"""Bytes that a budget leaves for tensors, beside slack and CUDA's own context."""

from __future__ import annotations

import math

# Shares of a budget that rounding and fragmentation may take, of CUDA's caching allocator and of the C library's.
SLACK = {"cuda": 0.04, "cpu": 0.01}
CUDA_CONTEXT = 600 * 2**20  # kernels, cuBLAS and its handles; measured where there is a card


def context_bytes(device: str) -> int:
    """Returns the bytes that a plan leaves to the driver on a kind of device ("cpu" or "cuda")."""
    return CUDA_CONTEXT if device == "cuda" else 0


def usable(memory: int, device: str) -> int:
    """Returns the bytes that a budget leaves for tensors: without slack, and on CUDA without the context."""
    return int(memory * (1 - SLACK[device])) - context_bytes(device)


def smallest_budget(need: float, device: str) -> int:
    """Returns the smallest budget of which ``usable`` leaves ``need`` bytes."""
    budget = math.ceil((need + context_bytes(device)) / (1 - SLACK[device]))
    while usable(budget, device) < need:
        budget += 1
    while usable(budget - 1, device) >= need:
        budget -= 1
    return budget
