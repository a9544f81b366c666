"""frozen_ffn beside the same network in eager PyTorch (frozen weights) and its matrix products alone (the limit)."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from measure import close, record, step
from shapes import shape

from petl_kernels import ops

EAGER = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu}
FORMS = [("nllb-600m", "relu", False), ("nllb-600m", "gelu", False), ("t5-base", "gelu_tanh", True)]


def inputs(name: str, device: str, dtype: torch.dtype, gated: bool):
    s = shape(name, device)
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    w1, w2 = new(s.ffn, s.d) / s.d**0.5, new(s.d, s.ffn) / s.ffn**0.5
    x = new(s.tokens, s.d, requires_grad=True)
    biases = (None, None) if gated else (new(s.ffn), new(s.d))
    return x, w1, biases[0], w2, biases[1], new(s.ffn, s.d) / s.d**0.5 if gated else None


def eager(x, w1, c1, w2, c2, gate, activation):
    h = EAGER[activation](F.linear(x, w1, c1))
    return F.linear(h if gate is None else h * F.linear(x, gate), w2, c2)


def products(x, w1, c1, w2, c2, gate, activation):
    h = F.linear(x, w1)
    return F.linear(h if gate is None else h + F.linear(x, gate), w2)


def recomputing(*arguments):
    return ops.frozen_ffn(*arguments, recompute=True)


IMPLEMENTATIONS = {"limit": products, "ours": ops.frozen_ffn, "ours recomputing": recomputing, "eager": eager}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "activation", "gated"), FORMS)
def test_frozen_ffn(benchmark, name, activation, gated, dtype, implementation, device):
    arguments = inputs(name, device, getattr(torch, dtype), gated)
    x = arguments[0]
    exact = eager(*(value if value is None else value.detach().double() for value in arguments), activation)
    assert close(ops.frozen_ffn(*arguments, activation), eager(*arguments, activation), exact)
    forward = IMPLEMENTATIONS[implementation]
    (tokens, d), f = x.shape, arguments[1].shape[0]
    weights = 3 if gated else 2
    benchmark.group = f"frozen_ffn {name} {tokens}x{d}x{f} {activation}{' gated' if gated else ''} {dtype} fwd+bwd"
    record(
        benchmark,
        step(lambda: forward(*arguments, activation), torch.randn_like(x), (x,)),
        op="frozen_ffn",
        implementation=implementation,
        flops=4 * weights * tokens * d * f,
        bytes_moved=x.element_size() * (4 * tokens * d + 2 * weights * d * f),
    )
