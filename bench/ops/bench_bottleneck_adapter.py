"""bottleneck_adapter beside passes over its arrays (the limit), and the same modules in eager PyTorch and compiled.

The limit moves what cannot stay: x and y forward (a copy), x, dy and dx backward. Forward at m = 64 is to take at most
1.5 copies.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, peer, require
from bench.run.work import Case, differentiated, forward_only, passes
from bench.shapes import distinct, shape
from petl_kernels import ops


def inputs(d: int, m: int, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device)
    x = new(tokens, d, dtype=dtype, requires_grad=True)
    down, up = new(m, d) / d**0.5, new(d, m) / m**0.5
    # No pre-activation comes near ReLU's kink, where rounding would decide which gradient is right.
    down_bias = 8 * new(m).sign()
    parameters = (down, down_bias, up, 0.1 * new(d), 1 + 0.1 * new(d), 0.1 * new(d))
    return x, *(p.requires_grad_() for p in parameters)


def ours(x, *parameters):
    return ops.bottleneck_adapter(x, *parameters)


def eager(x, *parameters):
    down, down_bias, up, up_bias, gain, shift = (p.to(x.dtype) for p in parameters)
    h = F.layer_norm(x, x.shape[-1:], gain, shift)
    return x + F.linear(F.relu(F.linear(h, down, down_bias)), up, up_bias)


FORWARDS = {"ours": lambda: ours, "eager": lambda: eager, "torch.compile": lambda: compiled(eager)}


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", peer("torch.compile")])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("bottleneck", [64, 128, 256, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d"))
def test_bottleneck_adapter(benchmark, name, dtype, bottleneck, backward, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and bottleneck not in (128, 256) and name != "t5")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    directed = differentiated if backward else forward_only
    if implementation == "limit":
        prepare = passes(*([2, 3] if backward else [2]))
        counted = counts.streams(2, s.tokens * s.d, size)
        if backward:
            counted += counts.streams(3, s.tokens * s.d, size)
    else:
        prepare = directed(FORWARDS[implementation]())
        counted = counts.bottleneck_adapter(s.tokens, s.d, bottleneck, size, backward)
    measure(
        benchmark,
        Case("bottleneck_adapter", name, s.tokens, dtype, device, f"m={bottleneck} {'fwd+bwd' if backward else 'fwd'}"),
        implementation,
        prepare,
        functools.partial(inputs, s.d, bottleneck, getattr(torch, dtype), device),
        counted,
        None if implementation == "limit" else eager,
    )
