"""bottleneck_adapter beside a copy of its input (the limit) and the same modules in eager PyTorch and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import close, record, step
from shapes import shape

from petl_kernels import ops


def inputs(name: str, device: str, dtype: torch.dtype, bottleneck: int):
    s = shape(name, device)
    x = torch.randn(s.tokens, s.d, device=device, dtype=dtype, requires_grad=True)
    parameters = (
        torch.randn(bottleneck, s.d, device=device) / s.d**0.5,
        torch.randn(bottleneck, device=device) * 0.1,
        torch.randn(s.d, bottleneck, device=device) / bottleneck**0.5,
        torch.randn(s.d, device=device) * 0.1,
        1 + 0.1 * torch.randn(s.d, device=device),
        0.1 * torch.randn(s.d, device=device),
    )
    return x, tuple(p.requires_grad_() for p in parameters), torch.randn_like(x)


def ours(x, *parameters):
    return ops.bottleneck_adapter(x, *parameters)


def eager(x, down, down_bias, up, up_bias, gain, shift):
    down, down_bias, up, up_bias, gain, shift = (p.to(x.dtype) for p in (down, down_bias, up, up_bias, gain, shift))
    h = F.layer_norm(x, x.shape[-1:], gain, shift)
    return x + F.linear(F.relu(F.linear(h, down, down_bias)), up, up_bias)


FORWARDS = {"limit": lambda x, *_: x.clone(), "ours": ours, "eager": eager}


@pytest.mark.parametrize("implementation", ["limit", "ours", "eager", pytest.param("compile", marks=pytest.mark.peer)])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("bottleneck", [64, 512])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["nllb-600m", "nllb-3.3b"])
def test_bottleneck_adapter(benchmark, name, dtype, bottleneck, backward, implementation, device):
    x, parameters, dy = inputs(name, device, getattr(torch, dtype), bottleneck)
    exact = eager(x.detach().double(), *(p.detach().double() for p in parameters))
    assert close(ours(x, *parameters), eager(x, *parameters), exact)
    tokens, d = x.shape
    forward = torch.compile(eager) if implementation == "compile" else FORWARDS[implementation]
    if backward and implementation == "limit":
        run = step(lambda: forward(x), dy, (x,))
    elif backward:
        run = step(lambda: forward(x, *parameters), dy, (x, *parameters))
    else:
        run = forward_only(lambda: forward(x, *parameters), x)
    direction = "fwd+bwd" if backward else "fwd"
    benchmark.group = f"bottleneck_adapter {name} {tokens}x{d} m={bottleneck} {dtype} {direction}"
    products = {"fwd": 4, "fwd+bwd": 14}[direction] * tokens * d * bottleneck
    record(
        benchmark,
        run,
        op="bottleneck_adapter",
        implementation=implementation,
        flops=0 if implementation == "limit" else products,
        bytes_moved=x.element_size() * (5 if backward else 2) * tokens * d,
    )


def forward_only(forward, x):
    def run() -> None:
        with torch.no_grad():
            forward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run
