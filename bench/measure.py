"""One way to time an implementation: warm, synchronised, forward and backward, fresh gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def step(forward: Callable[[], Tensor | Sequence[Tensor]], gradient: Tensor, leaves: Sequence[Tensor]) -> Callable:
    """A call that runs forward, then the gradients of ``leaves``, and waits until the device is done."""

    def run() -> None:
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.autograd.grad(outputs, leaves, [gradient] * len(outputs))
        if gradient.is_cuda:
            torch.cuda.synchronize()

    return run


def record(
    benchmark, run: Callable, *, op: str, implementation: str, flops: int, bytes_moved: int, rounds: int = 15
) -> None:
    """Time ``run`` and note the work it cannot avoid: operations, and bytes read and written once."""
    benchmark.extra_info.update(op=op, implementation=implementation, flops=flops, bytes=bytes_moved)
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=rounds // 5)


def peak_memory(run: Callable, device: str) -> int:
    """The most bytes that ``run`` takes beside what is there: of the allocator on a GPU, of the process on Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or what an earlier run has freed would serve this one, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # forgets the process' peak
    before = _process_bytes("VmRSS")
    run()
    return _process_bytes("VmHWM") - before


def _process_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def close(ours: Tensor, reference: Tensor, exact: Tensor) -> bool:
    """Whether our error against float64 is at most twice the reference's own (and a floor)."""
    exact = exact.double()
    scale = exact.norm().clamp_min(1e-30)
    error, allowed = (ours.double() - exact).norm() / scale, (reference.double() - exact).norm() / scale
    return bool(error <= 2 * allowed + 1e-6)
