"""attention beside PyTorch's own, forward and backward, with a padding mask as training has it.

The limit is PyTorch's without a mask and without dropout.
"""

from __future__ import annotations

import functools

import counts
import model
import pytest
import torch
import torch.nn.functional as F
from measure import Case, compiled, differentiated, measure, peer, require
from shapes import distinct, shape

from petl_kernels import ops
from petl_kernels.ops.philox import draw_seed

LENGTH = 128
# madlad-10b's heads of 256 are wider than the Triton kernel's blocks.
NAMES = [name for name in distinct("heads", "head_dim") if name != "madlad-10b"]


def inputs(heads: int, head_dim: int, dtype: torch.dtype, device: str, tokens: int):
    rows = max(1, tokens // LENGTH)
    q, k, v = (
        torch.randn(rows, LENGTH, heads, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1, 1, 1), device=device)
    return q, k, v, torch.arange(LENGTH, device=device) < lengths


def eager(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def sdpa(q, k, v, mask, dropout: float = 0.0):
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


@pytest.mark.parametrize("implementation", ["limit", "ours", "PyTorch", "eager", peer("torch.compile")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_attention(benchmark, name, dtype, dropout, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and not dropout)
    if dropout and implementation in ("eager", "torch.compile"):
        pytest.skip("without dropout for those")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    seed = draw_seed(torch.device(device)) if dropout else None
    functions = {
        "limit": lambda: lambda q, k, v, mask: sdpa(q, k, v, None),
        "ours": lambda: lambda q, k, v, mask: ops.attention(q, k, v, mask, dropout=dropout, seed=seed),
        "PyTorch": lambda: functools.partial(sdpa, dropout=dropout),
        "eager": lambda: eager,
        "torch.compile": lambda: compiled(eager),
    }

    def formula(q, k, v, mask):
        if implementation != "ours":
            return eager(q, k, v, mask)
        with ops.use("reference"):
            return ops.attention(q, k, v, mask, dropout=dropout, seed=seed)

    rows = s.tokens // LENGTH
    scores = counts.attention(rows, s.heads, LENGTH, LENGTH, s.head_dim, size, mask=rows * LENGTH)
    measure(
        benchmark,
        Case("attention", name, s.tokens, dtype, device, f"{rows}x{LENGTH} dropout {dropout:g}"),
        implementation,
        differentiated(functions[implementation]()),
        functools.partial(inputs, s.heads, s.head_dim, getattr(torch, dtype), device),
        model.once(scores, 2) if implementation == "limit" else scores,
        None if implementation == "limit" else formula,
        differentiated(sdpa) if implementation == "PyTorch" and dropout else None,
    )
