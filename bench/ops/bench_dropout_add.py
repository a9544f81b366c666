"""dropout_add beside passes over its arrays (the limit), torch's own dropout and addition, and torch.compile."""

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

P = 0.1


def eager(x, residual):
    return residual + F.dropout(x, P)


def inputs(d: int, dtype: torch.dtype, device: str, tokens: int):
    return tuple(torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", peer("torch.compile")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d"))
def test_dropout_add(benchmark, name, dtype, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    seed = draw_seed(torch.device(device))
    functions = {
        "ours": lambda: lambda x, residual: ops.dropout_add(x, residual, P, seed),
        "eager": lambda: eager,
        "torch.compile": lambda: compiled(eager),
    }
    is_limit, draws_its_own = implementation == "limit", implementation != "ours"

    def formula(x, residual):
        if draws_its_own:
            return residual + x
        with ops.use("reference"):
            return ops.dropout_add(x, residual, P, seed)

    arrays = s.tokens * s.d
    limit = counts.total([counts.streams(3, arrays, size), counts.streams(2, arrays, size)])
    measure(
        benchmark,
        Case("dropout_add", name, s.tokens, dtype, device, f"p={P:g}"),
        implementation,
        passes(3, 2) if is_limit else differentiated(functions[implementation]()),
        functools.partial(inputs, s.d, getattr(torch, dtype), device),
        limit if is_limit else counts.dropout_add(s.tokens, s.d, size),
        None if is_limit else formula,
        differentiated(lambda x, residual: residual + x) if draws_its_own else None,
    )
