"""lora_linear beside the frozen linear alone (the limit), PEFT twice, and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import close, record, step
from shapes import WIDTHS, shape

from petl_kernels import ops

RANK = 16


def inputs(name: str, device: str, dtype: torch.dtype):
    s = shape(name, device)
    x = torch.randn(s.tokens, s.d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(s.d, s.d, device=device, dtype=dtype) / s.d**0.5
    bias = torch.randn(s.d, device=device, dtype=dtype)
    # Adapters are kept in fp32 and used in the dtype of x, as a training run does.
    a = (torch.randn(RANK, s.d, device=device) / s.d**0.5).requires_grad_()
    b = (torch.randn(s.d, RANK, device=device) / RANK**0.5).requires_grad_()
    return x, weight, bias, a, b, torch.randn_like(x)


def eager(x, weight, bias, a, b):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def ours(x, weight, bias, a, b):
    return ops.lora_linear(x, weight, bias, a, b, 1.0)


def peft_linear(weight, bias, a, b, autocast_adapter_dtype: bool):
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped = torch.nn.Sequential(linear)
    model = peft.get_peft_model(wrapped, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def run_of(implementation, x, weight, bias, a, b, dy):
    if implementation == "limit":
        return step(lambda: F.linear(x, weight, bias), dy, (x,))
    if implementation.startswith("peft"):
        layer, a, b = peft_linear(weight, bias, a, b, autocast_adapter_dtype=implementation == "peft")
        return step(lambda: layer(x), dy, (x, a, b))
    forward = {"ours": ours, "eager": eager, "compile": torch.compile(eager)}[implementation]
    return step(lambda: forward(x, weight, bias, a, b), dy, (x, a, b))


peer = pytest.mark.peer


@pytest.mark.parametrize(
    "implementation",
    [
        "limit",
        "ours",
        "eager",
        pytest.param("peft", marks=peer),
        pytest.param("peft autocast_adapter_dtype=False", marks=peer),
        pytest.param("compile", marks=peer),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WIDTHS)
def test_lora_linear(benchmark, name, dtype, implementation, device):
    x, weight, bias, a, b, dy = inputs(name, device, getattr(torch, dtype))
    exact = eager(*(t.detach().double() for t in (x, weight, bias, a, b)))
    assert close(ours(x, weight, bias, a, b), eager(x, weight, bias, a, b), exact)
    tokens, d = x.shape
    benchmark.group = f"lora_linear {name} {tokens}x{d} r={RANK} {dtype} fwd+bwd"
    record(
        benchmark,
        run_of(implementation, x, weight, bias, a, b, dy),
        op="lora_linear",
        implementation=implementation,
        flops=4 * tokens * d * d + (0 if implementation == "limit" else 12 * tokens * d * RANK),
        bytes_moved=x.element_size() * (5 * tokens * d + 2 * d * d),
    )
