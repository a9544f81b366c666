"""The candidates of bench/candidates that launch the shipped kernels: values and gradients in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from petl_kernels import parity

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.repeat,  # nothing that is installed calls a candidate
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="contest.py checks them on a CUDA device"),
]
# Ranks of 8 and widths of 8 where rows have to begin at multiples of 16 bytes (the library's own loads).
CASES = {
    "one linear": dict(rows=(33,), ns=(40,), k=72, ranks=(8,)),
    "no bias, several splits": dict(rows=(129,), ns=(40,), k=72, ranks=(16,), bias=False),
    "three linears, fp32 adapters": dict(
        rows=(2, 17), ns=(40, 32, 8), k=40, ranks=(8, 8, 16), adapter_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    from bench.candidates import contest

    given = parity.lora_linear_arguments(parity.Source(torch.device("cpu"), dtype), **CASES[case])
    assert contest.difference("bordered", given) is None


def test_a_wrong_candidate_is_found(monkeypatch):
    from bench.candidates import bordered, contest

    right = bordered.border_of
    monkeypatch.setattr(bordered, "border_of", lambda *args: right(*args) * 1.01)
    given = parity.lora_linear_arguments(parity.Source(torch.device("cpu"), torch.float32))
    assert "off by" in contest.difference("bordered", given)
