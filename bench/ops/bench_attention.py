"""attention beside PyTorch's own, forward and backward, with a padding mask as training has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import record, step
from shapes import TOKENS

from petl_kernels import ops

HEADS, HEAD_DIM, LENGTH = 16, 64, 128


def inputs(device: str, dtype: torch.dtype):
    rows = TOKENS[device] // LENGTH
    q, k, v, do = (
        torch.randn(rows, LENGTH, HEADS, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_(True)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1, 1, 1), device=device)
    return q, k, v, torch.arange(LENGTH, device=device) < lengths, do


IMPLEMENTATIONS = {
    "limit": lambda q, k, v, mask, p: F.scaled_dot_product_attention(q, k, v, mask, p),
    "ours": lambda q, k, v, mask, p: ops.attention(q, k, v, mask, dropout=p),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention(benchmark, dtype, dropout, implementation, device):
    q, k, v, mask, do = inputs(device, getattr(torch, dtype))
    attention = IMPLEMENTATIONS[implementation]
    rows = q.shape[0]
    benchmark.group = f"attention {rows}x{HEADS}x{LENGTH}x{HEAD_DIM} {dtype} dropout {dropout} fwd+bwd"
    record(
        benchmark,
        step(lambda: attention(q, k, v, mask, dropout), do, (q, k, v)),
        op="attention",
        implementation=implementation,
        flops=14 * rows * HEADS * LENGTH * LENGTH * HEAD_DIM,
        bytes_moved=q.element_size() * 12 * q.numel(),
    )
