"""parallel_ffn beside the frozen network's products (the limit), an adapter beside the network, and eager PyTorch.

The limit has no adapter: the ratio is what one costs. "ours, beside" is what runs where the two cannot be one network
(a quantized base, another activation): ``frozen_ffn``, then ``bottleneck_adapter`` added to its result.
"""

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
from petl_kernels.ops.parallel_ffn import room, with_room

SCALE = 4.0


def inputs(d: int, f: int, m: int, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device)
    x, c2 = new(tokens, d, dtype=dtype, requires_grad=True), new(d, dtype=dtype)
    # No pre-activation comes near ReLU's kink, where rounding would decide which gradient is right.
    w1, c1, w2 = (t.to(dtype) for t in (new(f, d) / d**0.5, 8 * new(f).sign(), new(d, f) / f**0.5))
    adapter = (new(m, d) / d**0.5, 8 * new(m).sign(), new(d, m) / m**0.5, new(d))
    return x, *with_room(w1, c1, w2, m), c2, *(p.requires_grad_() for p in adapter)


def network(w1, c1, w2, down):
    """Without the room."""
    f = w1.shape[0] - room(down.shape[0])
    return w1[:f], c1[:f], w2[:, :f]


def products(x, *given):
    """A step without the adapter, which has no gradient then."""
    w1, c1, w2, _, down, *_ = (tensor.detach() for tensor in given)
    w1, _, w2 = network(w1, c1, w2, down)
    return differentiated(lambda x: F.linear(F.linear(x, w1), w2))(x)


def ours(x, w1, c1, w2, c2, *adapter):
    return ops.parallel_ffn(x, w1, c1, w2, c2, *adapter, scale=SCALE)


def beside(x, w1, c1, w2, c2, *adapter):
    w1, c1, w2 = network(w1, c1, w2, adapter[0])
    return ops.bottleneck_adapter(x, *adapter, scale=SCALE, residual=ops.frozen_ffn(x, w1, c1, w2, c2))


def eager(x, w1, c1, w2, c2, *adapter):
    w1, c1, w2 = network(w1, c1, w2, adapter[0])
    down, down_bias, up, up_bias = (p.to(x.dtype) for p in adapter)
    y = F.linear(F.relu(F.linear(x, w1, c1)), w2, c2)
    return y + SCALE * F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)


FORWARDS = {"ours": ours, "ours, beside": beside, "eager": eager}


@pytest.mark.parametrize("implementation", ["limit", "ours", "ours, beside", "eager", peer("torch.compile")])
@pytest.mark.parametrize("bottleneck", [64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", distinct("d", "ffn", "gated"))
def test_parallel_ffn(benchmark, name, dtype, bottleneck, implementation, device):
    if name in ("t5", "madlad-3b", "madlad-10b"):
        pytest.skip("gated")
    require(name, device, implementation, small=dtype == "bfloat16" and bottleneck == 64 and name == "nllb-600m")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    if implementation == "limit":
        prepare = products
    elif implementation == "torch.compile":
        prepare = differentiated(compiled(eager))
    else:
        prepare = differentiated(FORWARDS[implementation])
    limit = counts.total([counts.frozen_linear(s.tokens, s.ffn, s.d, size)] * 2)
    measure(
        benchmark,
        Case("parallel_ffn", name, s.tokens, dtype, device, f"relu m={bottleneck}"),
        implementation,
        prepare,
        functools.partial(inputs, s.d, s.ffn, bottleneck, getattr(torch, dtype), device),
        limit if implementation == "limit" else counts.parallel_ffn(s.tokens, s.d, s.ffn, bottleneck, "relu", size),
        None if implementation == "limit" else eager,
    )
