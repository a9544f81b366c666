"""frozen_linear beside torch's own linear with a frozen weight, forward and input gradient."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import require
from bench.run.work import Case, differentiated
from bench.shapes import distinct, shape
from petl_kernels import ops


def inputs(d: int, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    return new(tokens, d, requires_grad=True), new(d, d) / d**0.5, new(d)


IMPLEMENTATIONS = {"limit": F.linear, "ours": ops.frozen_linear}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d"))
def test_frozen_linear(benchmark, name, dtype, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16")
    s = shape(name, device)
    measure(
        benchmark,
        Case("frozen_linear", name, s.tokens, dtype, device),
        implementation,
        differentiated(IMPLEMENTATIONS[implementation]),
        functools.partial(inputs, s.d, getattr(torch, dtype), device),
        # The library's on a GPU, by default.
        counts.frozen_linear(s.tokens, s.d, s.d, getattr(torch, dtype).itemsize),
        F.linear,
    )
