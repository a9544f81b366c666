"""frozen_linear beside torch's own linear with a frozen weight, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import record, step
from shapes import WIDTHS, shape

from petl_kernels import ops


def inputs(name: str, device: str, dtype: torch.dtype):
    s = shape(name, device)
    x = torch.randn(s.tokens, s.d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(s.d, s.d, device=device, dtype=dtype) / s.d**0.5
    bias = torch.randn(s.d, device=device, dtype=dtype, requires_grad=True)
    return x, weight, bias, torch.randn_like(x)


IMPLEMENTATIONS = {"limit": F.linear, "ours": ops.frozen_linear}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WIDTHS)
def test_frozen_linear(benchmark, name, dtype, implementation, device):
    x, weight, bias, dy = inputs(name, device, getattr(torch, dtype))
    linear = IMPLEMENTATIONS[implementation]
    tokens, d = x.shape
    benchmark.group = f"frozen_linear {name} {tokens}x{d} {dtype} fwd+bwd"
    record(
        benchmark,
        step(lambda: linear(x, weight, bias), dy, (x, bias)),
        op="frozen_linear",
        implementation=implementation,
        flops=4 * tokens * d * d,
        bytes_moved=x.element_size() * (4 * tokens * d + 2 * d * d),
    )
