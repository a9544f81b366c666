"""Triton's kernels, interpreted, on a CUDA device that host memory plays: who serves, and where the first use happens.

``test_rehearsal.py`` runs these with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from petl_kernels import dispatch
from petl_kernels.ops.quantized import quantize
from rehearsal import card  # noqa: F401


@pytest.fixture(autouse=True)
def first_use():
    dispatch._chosen.clear()
    dispatch._parity_errors.clear()


@pytest.mark.parametrize(
    "state",
    [contextlib.nullcontext, torch.inference_mode, lambda: torch.autocast("cuda", torch.float16)],
    ids=["plain", "inference_mode", "autocast"],
)
def test_a_quantized_weight_is_served_by_triton(state):
    """Its first use is in the handler of a tensor subclass, and its check below autograd: the reference served once."""
    dtype = torch.float16
    dense = torch.randn(40, 72, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    weight = quantize(dense, "int8")
    x = torch.randn(5, 72, device="cuda", dtype=dtype, requires_grad=True)
    with state():
        y = F.linear(x, weight)
    if y.requires_grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(5, 72), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(y, F.linear(x, weight.dequantize()), rtol=1e-2, atol=2e-2)
    assert dispatch.turned_down() == []
    assert dispatch.backend_of("quantized_project", "cuda", dtype) == "triton"
