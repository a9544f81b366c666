"""activation beside torch's own relu and dropout: the packed ReLU keeps one bit an element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import close, record, step
from shapes import WIDTHS, shape

from petl_kernels import ops

IMPLEMENTATIONS = {
    "limit": lambda z, p: z.clone(),
    "ours": lambda z, p: ops.activation(z, "relu", p),
    "eager": lambda z, p: F.dropout(F.relu(z), p),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WIDTHS)
def test_packed_relu(benchmark, name, dtype, dropout, implementation, device):
    s = shape(name, device)
    z = torch.randn(s.tokens, s.ffn, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    assert close(ops.activation(z, "relu"), F.relu(z), F.relu(z.detach().double()))
    forward = IMPLEMENTATIONS[implementation]
    benchmark.group = f"activation relu {name} {s.tokens}x{s.ffn} p={dropout} {dtype} fwd+bwd"
    record(
        benchmark,
        step(lambda: forward(z, dropout), torch.randn_like(z), (z,)),
        op="activation",
        implementation=implementation,
        flops=0,
        bytes_moved=z.numel() * 4 * z.element_size() + z.numel() // 4,
    )
