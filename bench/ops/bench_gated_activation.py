"""gated_activation beside passes over its arrays (the limit), eager PyTorch, Liger's GEGLU and SwiGLU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, installed, peer, require
from bench.run.work import Case, differentiated, passes
from bench.shapes import T5_MODELS, shape
from petl_kernels import ops

EAGER = {"gelu_tanh": lambda z, g: F.gelu(z, approximate="tanh") * g, "silu": lambda z, g: F.silu(z) * g}


def liger(kind: str, device: str):
    functional = installed("liger_kernel.transformers.functional", "Liger", device)
    # Its backward writes dz and dg over z and g: from the second round on they are not what was drawn.
    return {"gelu_tanh": functional.liger_geglu, "silu": functional.liger_swiglu}[kind]


IMPLEMENTATIONS = {
    "ours": lambda kind, device: lambda z, g: ops.gated_activation(z, g, kind),
    "eager": lambda kind, device: EAGER[kind],
    "torch.compile": lambda kind, device: compiled(EAGER[kind]),
    "Liger": liger,
}


def inputs(f: int, dtype: torch.dtype, device: str, tokens: int):
    return tuple(torch.randn(tokens, f, device=device, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", peer("torch.compile"), peer("Liger")])
@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", T5_MODELS)
def test_gated_activation(benchmark, name, dtype, kind, implementation, device):
    require(name, device, implementation)
    if dtype == "float32" and kind == "silu":
        pytest.skip("fp32 for T5's own activation")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    is_limit = implementation == "limit"
    arrays = s.tokens * s.ffn
    limit = counts.total([counts.streams(3, arrays, size), counts.streams(5, arrays, size)])
    measure(
        benchmark,
        Case("gated_activation", name, s.tokens, dtype, device, kind),
        implementation,
        passes(3, 5) if is_limit else differentiated(IMPLEMENTATIONS[implementation](kind, device)),
        functools.partial(inputs, s.ffn, getattr(torch, dtype), device),
        limit if is_limit else counts.gated_activation(s.tokens, s.ffn, size),
        None if is_limit else EAGER[kind],
    )
