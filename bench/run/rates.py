"""Rates of this machine, measured: a copy through memory and a square matrix product in each dtype.

These two rates are the roof that ops are held against, so the fastest of a few rounds counts: what else the machine
was doing just then is no part of it. About a second in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

DTYPES = ("bfloat16", "float16", "float32")
# Larger than any cache that counts here: an EPYC's L3 slices, and the 126 MB of L2 on a B200.
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
SIDE = {"cpu": 512, "cuda": 8192}
LEAST_SECONDS = 4e-3  # a product shorter than that says more about starting threads than about the matrix units
ROUNDS = {"cpu": 11, "cuda": 11}


def measured_rates(device: str) -> dict:
    """{"copy": bytes/s, read and written, "matmul": {dtype: FLOP/s}} of ``device`` ("cpu" or "cuda").

    fp32 products run as PyTorch is set up here (TF32 only where the caller has allowed it).
    """
    rates = {"copy": copy_rate(device), "matmul": {name: matmul_rate(device, name) for name in DTYPES}}
    if device == "cuda":
        torch.cuda.empty_cache()  # or gigabytes stay reserved beside benchmarks that run under a cap
    return rates


def copy_rate(device: str, size: int | None = None) -> float:
    """Bytes read and written a second when ``size`` bytes are copied."""
    source = torch.empty(size or COPY_BYTES[device], dtype=torch.uint8, device=device).random_()  # zeros may go faster
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str, dtype: str, side: int | None = None) -> float:
    """Operations a second of a square product; 2·n³ of them.

    On the CPU n doubles until a product takes 4 ms, so that fp16 without instructions of its own stays short.
    """
    side = side or SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    multiply = lambda: torch.matmul(a, b, out=out)  # noqa: E731
    if device == "cpu":
        multiply()
        if _seconds(multiply) < LEAST_SECONDS and side < 4096:
            return matmul_rate(device, dtype, 2 * side)
    return 2 * side**3 / _fastest_seconds(multiply, device)


def _fastest_seconds(call: Callable, device: str) -> float:
    call()
    if device == "cpu":
        return min(_seconds(call) for _ in range(ROUNDS[device]))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS[device] + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1e3


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
