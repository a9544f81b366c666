"""dropout_add beside torch's own dropout and addition, and a plain addition (the limit)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import record, step
from shapes import WIDTHS, shape

from petl_kernels import ops

P = 0.1
IMPLEMENTATIONS = {
    "limit": lambda x, residual: residual + x,
    "ours": lambda x, residual: ops.dropout_add(x, residual, P),
    "eager": lambda x, residual: residual + F.dropout(x, P),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WIDTHS)
def test_dropout_add(benchmark, name, dtype, implementation, device):
    s = shape(name, device)
    x, residual = (
        torch.randn(s.tokens, s.d, device=device, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(2)
    )
    forward = IMPLEMENTATIONS[implementation]
    benchmark.group = f"dropout_add {name} {s.tokens}x{s.d} p={P} {dtype} fwd+bwd"
    record(
        benchmark,
        step(lambda: forward(x, residual), torch.randn_like(x), (x, residual)),
        op="dropout_add",
        implementation=implementation,
        flops=0,
        bytes_moved=5 * x.numel() * x.element_size(),
    )
