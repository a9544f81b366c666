"""dropout_add_norm beside passes over its arrays (the limit), our two ops, torch's own three, and torch.compile."""

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


def eager(y, residual, weight, bias):
    h = residual + F.dropout(y, P)
    return h, F.layer_norm(h, h.shape[-1:], weight, bias)


def without_dropout(y, residual, weight, bias):
    h = residual + y
    return h, F.layer_norm(h, h.shape[-1:], weight, bias)


def two_ops(seed: torch.Tensor):
    def function(y, residual, weight, bias):
        h = ops.dropout_add(y, residual, P, seed)
        return h, ops.layer_norm(h, weight, bias)

    return function


def inputs(d: int, dtype: torch.dtype, trained: bool, device: str, tokens: int):
    arrays = (torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    scales = (1 + 0.1 * torch.randn(d, device=device) for _ in range(2))
    return *arrays, *(scale.to(dtype).requires_grad_(trained) for scale in scales)


@pytest.mark.parametrize("implementation", ["limit", "ours", "two ops", "eager", peer("torch.compile")])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d"))
def test_dropout_add_norm(benchmark, name, dtype, trained, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and not trained)
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    seed = draw_seed(torch.device(device))
    functions = {
        "ours": lambda: lambda y, residual, w, v: ops.dropout_add_norm(y, residual, w, v, P, seed),
        "two ops": lambda: two_ops(seed),
        "eager": lambda: eager,
        "torch.compile": lambda: compiled(eager),
    }
    is_limit, draws_its_own = implementation == "limit", implementation in ("eager", "torch.compile")

    def formula(y, residual, weight, bias):
        with ops.use("reference"):
            return ops.dropout_add_norm(y, residual, weight, bias, P, seed)

    arrays = s.tokens * s.d
    limit = counts.total([counts.streams(4, arrays, size), counts.streams(5, arrays, size)])
    measure(
        benchmark,
        Case("dropout_add_norm", name, s.tokens, dtype, device, "trained" if trained else "frozen"),
        implementation,
        passes(4, 5) if is_limit else differentiated(functions[implementation]()),
        functools.partial(inputs, s.d, getattr(torch, dtype), trained, device),
        limit if is_limit else counts.dropout_add_norm(s.tokens, s.d, size, trained),
        None if is_limit else without_dropout if draws_its_own else formula,
        differentiated(without_dropout) if draws_its_own else None,
    )
