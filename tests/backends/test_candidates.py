"""The candidates of bench/candidates: values and gradients in Triton's interpreter, compiled code for each card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petl_kernels import parity

pytest.importorskip("triton")
pytestmark = pytest.mark.repeat  # nothing that is installed calls a candidate
FOLDER = Path(__file__).parents[2] / "bench" / "candidates"
sys.path.insert(0, str(FOLDER))
NAMES = ("library", "in_loop", "one_read", "bordered", "tma", "tma_flat", "tma_warps", "two_streams")
# Ranks of 8 and widths of 8 where rows have to begin at multiples of 16 bytes (TMA, and the library's own loads).
CASES = {
    "one linear": dict(rows=(33,), ns=(40,), k=72, ranks=(8,)),
    "no bias, several splits": dict(rows=(129,), ns=(40,), k=72, ranks=(16,), bias=False),
    "three linears, fp32 adapters": dict(
        rows=(2, 17), ns=(40, 32, 8), k=40, ranks=(8, 8, 16), adapter_dtype=torch.float32
    ),
}
SHARED_MEMORY = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
MATRIX_INSTRUCTION = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}
WITH_TMA = {"_product_kernel"}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="contest.py checks them on a CUDA device")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.repeat)], ids=["fp32", "fp16"]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, case, dtype):
    import contest

    given = parity.lora_linear_arguments(parity.Source(torch.device("cpu"), dtype), **CASES[case])
    assert contest.difference(name, given) is None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="contest.py checks them on a CUDA device")
def test_a_wrong_candidate_is_found(monkeypatch):
    import contest
    import two_streams

    right = two_streams.lora_linear
    monkeypatch.setattr(two_streams, "lora_linear", lambda *args: right(args[0] * 1.01, *args[1:]))
    given = parity.lora_linear_arguments(parity.Source(torch.device("cpu"), torch.float32))
    assert "off by" in contest.difference("two_streams", given)


@pytest.mark.parametrize("card", SHARED_MEMORY)
def test_compiled_kernels(card):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("candidates_aot.py")
    run = subprocess.run([sys.executable, script, card], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert any(report["kernel"] in WITH_TMA for report in reports) == (card != "sm80")
    for report in reports:
        assert report["stack"] <= 16, report
        assert report["shared"] <= SHARED_MEMORY[card], report
        assert not report["atomics"], report
        assert not report.get("races"), report
        if report["kernel"] != "_sum_kernel":
            assert report["instructions"][MATRIX_INSTRUCTION[card]], report
        if report["kernel"] in WITH_TMA:
            assert report["tma"], report
