from __future__ import annotations

import pytest
import torch

from petl_kernels.memory.cap import capped, peak, reset_peak

pytest.importorskip("petl_kernels._C")
CPU = torch.device("cpu")
MIB = 2**20


def test_allocations_over_the_cap_fail_and_those_under_it_work():
    with capped(8 * MIB, CPU):
        held = torch.empty(6 * MIB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="more than the limit"):
            torch.empty(3 * MIB, dtype=torch.uint8)
        del held
        torch.empty(7 * MIB, dtype=torch.uint8)
    torch.empty(20 * MIB, dtype=torch.uint8)


def test_kernels_and_other_threads_are_counted():
    w = torch.ones(600, 600, requires_grad=True)
    with capped(64 * MIB, CPU):
        reset_peak(CPU)
        before = peak(CPU)
        (w @ w).sum().backward()  # backward runs in the engine
        assert peak(CPU) - before >= 3 * w.nbytes


def test_no_cap_is_none():
    with capped(None, CPU):
        torch.empty(MIB)
