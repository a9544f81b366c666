"""layer_norm and rms_norm beside passes over their arrays (the limit), torch's own, T5's formula, Liger."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, installed, peer, require
from bench.run.work import Case, differentiated, passes
from bench.shapes import distinct, shape
from petl_kernels import ops


def t5_layer_norm(x, weight):
    variance = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def liger(op: str, device: str):
    functional = installed("liger_kernel.transformers.functional", "Liger", device)
    if op == "layer_norm":
        return lambda x, weight, bias: functional.liger_layer_norm(x, weight, bias, 1e-5)
    # Not in place: dy is used again.
    return lambda x, weight: functional.liger_rms_norm(x, weight, 1e-6, in_place=False)


EAGER = {"layer_norm": layer_norm, "rms_norm": t5_layer_norm}
OURS = {"layer_norm": ops.layer_norm, "rms_norm": lambda x, weight: ops.rms_norm(x, weight, 1e-6)}
IMPLEMENTATIONS = {
    "ours": lambda op, device: OURS[op],
    "eager": lambda op, device: EAGER[op],
    "torch.compile": lambda op, device: compiled(EAGER[op]),
    "Liger": liger,
}


def inputs(op: str, d: int, dtype: torch.dtype, trained: bool, device: str, tokens: int):
    x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    scales = [1 + 0.1 * torch.randn(d, device=device) for _ in range({"layer_norm": 2, "rms_norm": 1}[op])]
    return x, *(scale.to(dtype).requires_grad_(trained) for scale in scales)


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", peer("torch.compile"), peer("Liger")])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d"))
@pytest.mark.parametrize("op", EAGER)
def test_norm(benchmark, op, name, dtype, trained, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and not trained)
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    is_limit = implementation == "limit"
    arrays = s.tokens * s.d
    limit = counts.total([counts.streams(2, arrays, size), counts.streams(3, arrays, size)])
    counted = getattr(counts, op)(s.tokens, s.d, size, trained)
    measure(
        benchmark,
        Case(op, name, s.tokens, dtype, device, "trained" if trained else "frozen"),
        implementation,
        passes(2, 3) if is_limit else differentiated(IMPLEMENTATIONS[implementation](op, device)),
        functools.partial(inputs, op, s.d, getattr(torch, dtype), trained, device),
        limit if is_limit else counted,
        None if is_limit else EAGER[op],
    )
