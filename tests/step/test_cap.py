from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from petl_kernels.step.cap import capped, expand_segments, peak, reset_peak

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


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    "card, in_use, given, expected",
    [
        (True, False, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (True, False, {NAMES[0]: "max_split_size_mb:64"}, {NAMES[0]: "max_split_size_mb:64"}),
        (True, False, {NAMES[1]: ""}, {NAMES[1]: ""}),
        (True, True, {}, {}),
        (False, False, {}, {}),
    ],
)
def test_segments_expand_unless_the_user_or_cuda_was_first(monkeypatch, card, in_use, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    expand_segments()
    assert {name: environment[name] for name in NAMES if name in environment} == expected


@pytest.mark.slow
def test_pytorch_reads_the_setting_after_its_import():
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        pytest.skip("this PyTorch does not say what it has read")
    program = (
        "import torch\nfrom petl_kernels.step.cap import expand_segments\n"
        "torch.cuda.is_available = lambda: True\nexpand_segments()\n"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["expandable_segments:True"]


@pytest.mark.gpu
def test_the_cap_holds_with_expandable_segments():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    program = (
        "import torch\nfrom petl_kernels.step.cap import capped, expand_segments\n"
        "expand_segments()\ndevice = torch.device('cuda:0')\ntorch.zeros(1, device=device)\n"
        "with capped(2**31, device):\n"
        "    try:\n        held = [torch.empty(2**26, dtype=torch.uint8, device=device) for _ in range(40)]\n"
        "    except torch.OutOfMemoryError:\n        print('refused')\n"
        "print(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))\n"
        "print(torch.cuda.max_memory_reserved() <= 2**31)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["refused", "True", "True"]
