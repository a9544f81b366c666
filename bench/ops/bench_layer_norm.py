"""layer_norm beside torch's own, and rms_norm beside the formula of T5's layer; frozen and trained parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import close, record, step
from shapes import WIDTHS, shape

from petl_kernels import ops


def t5_layer_norm(x, weight):
    variance = x.float().square().mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


IMPLEMENTATIONS = {
    "layer_norm": {"limit": lambda x, *_: x.clone(), "ours": ops.layer_norm, "eager": layer_norm},
    "rms_norm": {"limit": lambda x, *_: x.clone(), "ours": ops.rms_norm, "eager": t5_layer_norm},
}


def inputs(op: str, name: str, device: str, dtype: torch.dtype, trained: bool):
    s = shape(name, device)
    x = torch.randn(s.tokens, s.d, device=device, dtype=dtype, requires_grad=True)
    count = {"layer_norm": 2, "rms_norm": 1}[op]
    parameters = [1 + torch.randn(s.d, device=device).mul(0.1).to(dtype) for _ in range(count)]
    return x, [parameter.requires_grad_(trained) for parameter in parameters], torch.randn_like(x)


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_norm(benchmark, op, name, dtype, trained, implementation, device):
    x, parameters, dy = inputs(op, name, device, getattr(torch, dtype), trained)
    forwards = IMPLEMENTATIONS[op]
    exact = forwards["eager"](x.detach().double(), *(p.detach().double() for p in parameters))
    assert close(forwards["ours"](x, *parameters), forwards["eager"](x, *parameters), exact)
    forward = forwards[implementation]
    leaves = (x, *parameters) if trained and implementation != "limit" else (x,)
    tokens, d = x.shape
    benchmark.group = f"{op} {name} {tokens}x{d} {dtype} {'trained' if trained else 'frozen'} fwd+bwd"
    record(
        benchmark,
        step(lambda: forward(x, *parameters), dy, leaves),
        op=op,
        implementation=implementation,
        flops=20 * tokens * d,
        bytes_moved=5 * x.element_size() * tokens * d,
    )
