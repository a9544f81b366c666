"""frozen_ffn beside its matrix products alone (the limit), and the same network in eager PyTorch and torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, peer, require
from bench.run.work import Case, differentiated
from bench.shapes import distinct, shape
from petl_kernels import ops
from petl_kernels.dispatch import kernel_of

EAGER = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
FORMS = {"relu": ("relu", False), "gelu": ("gelu", False), "gelu_tanh gated": ("gelu_tanh", True)}


def inputs(d: int, f: int, gated: bool, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    x, w1, w2 = new(tokens, d, requires_grad=True), new(f, d) / d**0.5, new(d, f) / f**0.5
    if gated:
        return x, w1, None, w2, None, new(f, d) / d**0.5
    return x, w1, new(f), w2, new(d), None


def eager(x, w1, c1, w2, c2, gate, activation):
    h = EAGER[activation](F.linear(x, w1, c1))
    return F.linear(h if gate is None else h * F.linear(x, gate), w2, c2)


def products(x, w1, c1, w2, c2, gate, activation):
    h = F.linear(x, w1)
    return F.linear(h if gate is None else h + F.linear(x, gate), w2)


def recomputing(*arguments, activation):
    return ops.frozen_ffn(*arguments, activation=activation, recompute=True)


def by_cublaslt(*arguments, activation):
    """Ours with cuBLASLt's products in the place of PyTorch's."""
    with ops.use("cuda"):
        return ops.frozen_ffn(*arguments, activation=activation)


IMPLEMENTATIONS = {
    "limit": products,
    "ours": ops.frozen_ffn,
    "ours, recomputing": recomputing,
    "ours, cuBLASLt's products": by_cublaslt,
    "eager": eager,
    "torch.compile": eager,
}


@pytest.mark.parametrize("implementation", [peer(n) if n == "torch.compile" else n for n in IMPLEMENTATIONS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d", "ffn", "gated"))
def test_frozen_ffn(benchmark, name, dtype, form, implementation, device):
    activation, gated = FORMS[form]
    if gated != (name in ("t5", "madlad-3b", "madlad-10b")) or (form == "gelu" and name != "nllb-600m"):
        pytest.skip("another family's form")
    if implementation == "ours, cuBLASLt's products" and kernel_of("frozen_ffn", "cuda") is None:
        pytest.skip("the extension was built without cuBLASLt")
    require(name, device, implementation, small=dtype == "bfloat16" and name != "nllb-3.3b")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    forward = IMPLEMENTATIONS[implementation]
    function = functools.partial(forward, activation=activation)
    if implementation == "torch.compile":
        function = compiled(function)
    limit = counts.total([counts.frozen_linear(s.tokens, s.ffn, s.d, size)] * (3 if gated else 2))
    again = implementation == "ours, recomputing"
    ffn = counts.frozen_ffn(s.tokens, s.d, s.ffn, activation, gated, size, again)
    measure(
        benchmark,
        Case("frozen_ffn", name, s.tokens, dtype, device, form),
        implementation,
        differentiated(function),
        functools.partial(inputs, s.d, s.ffn, gated, getattr(torch, dtype), device),
        limit if implementation == "limit" else ffn,
        None if implementation == "limit" else functools.partial(eager, activation=activation),
    )
