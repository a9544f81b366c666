"""activation (the packed ReLU) beside passes over its arrays (the limit), and torch's own relu and dropout."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, peer, require
from bench.run.work import Case, differentiated, passes
from bench.shapes import distinct, shape
from petl_kernels import ops
from petl_kernels.ops.philox import draw_seed


def eager(z, p: float):
    return F.dropout(F.relu(z), p)


def inputs(f: int, dtype: torch.dtype, device: str, tokens: int):
    return (torch.randn(tokens, f, device=device, dtype=dtype, requires_grad=True),)


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", peer("torch.compile")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("ffn"))
def test_packed_relu(benchmark, name, dtype, dropout, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and not dropout)
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    seed = draw_seed(torch.device(device)) if dropout else None
    functions = {
        "ours": lambda: lambda z: ops.activation(z, "relu", dropout, seed),
        "eager": lambda: lambda z: eager(z, dropout),
        "torch.compile": lambda: compiled(lambda z: eager(z, dropout)),
    }
    is_limit, draws_its_own = implementation == "limit", dropout and implementation != "ours"

    def formula(z):
        if draws_its_own:
            return F.relu(z)
        with ops.use("reference"):
            return ops.activation(z, "relu", dropout, seed)

    streams = counts.streams(2, s.tokens * s.ffn, size)
    measure(
        benchmark,
        Case("activation", name, s.tokens, dtype, device, f"relu p={dropout:g}"),
        implementation,
        passes(2, 2) if is_limit else differentiated(functions[implementation]()),
        functools.partial(inputs, s.ffn, getattr(torch, dtype), device),
        streams + streams if is_limit else counts.activation(s.tokens, s.ffn, "relu", size, bool(dropout)),
        None if is_limit else formula,
        differentiated(F.relu) if draws_its_own else None,
    )
