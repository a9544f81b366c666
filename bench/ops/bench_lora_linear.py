"""lora_linear, alone and for q, k and v in one group, beside the frozen linears (the limit), PEFT and torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import compiled, installed, peer, require
from bench.run.work import Case, Work, differentiated
from bench.shapes import WIDE, distinct, shape
from petl_kernels import ops

# name: linears in the group, rank
CASES = {"r=8": (1, 8), "r=16": (1, 16), "r=64": (1, 64), "r=16 q/k/v": (3, 16)}


def inputs(d: int, groups: int, rank: int, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device)
    x = new(tokens, d, dtype=dtype, requires_grad=True)
    weights = [(new(d, d) / d**0.5).to(dtype) for _ in range(groups)]
    biases = [new(d, dtype=dtype) for _ in range(groups)]
    # Adapters are kept in fp32 and used in the dtype of x, as a training run does.
    a = [(new(rank, d) / d**0.5).requires_grad_() for _ in range(groups)]
    b = [(new(d, rank) / rank**0.5).requires_grad_() for _ in range(groups)]
    return x, *weights, *biases, *a, *b


def parts(tensors) -> list:
    """[weights, biases, a, b]"""
    groups = len(tensors) // 4
    return [tensors[first : first + groups] for first in range(0, len(tensors), groups)]


def eager(x, *tensors):
    return [
        F.linear(x, w, c) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        for w, c, a, b in zip(*parts(tensors), strict=True)
    ]


def grouped(x, *tensors):
    weights, biases, a, b = (list(part) for part in parts(tensors))
    return ops.lora_linear_grouped(x, weights, biases, a, b, [1.0] * len(a))


def one_by_one(x, *tensors):
    return [ops.lora_linear(x, w, c, a, b, 1.0) for w, c, a, b in zip(*parts(tensors), strict=True)]


def frozen(x, *tensors) -> Work:
    weights, biases, *_ = parts(tensors)
    return Work(lambda: [F.linear(x, w, c) for w, c in zip(weights, biases, strict=True)], (x,))


def peft_of(autocast_adapter_dtype: bool):
    peft = installed("peft", "PEFT")

    def prepare(x, *tensors) -> Work:
        layers = [
            _peft_linear(peft, w, c, a, b, autocast_adapter_dtype) for w, c, a, b in zip(*parts(tensors), strict=True)
        ]
        own = [[getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B")]
        return Work(lambda: [layer(x) for layer in layers], (x, *own[0], *own[1]))

    return prepare


def _peft_linear(peft, weight, bias, a, b, autocast_adapter_dtype: bool):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=a.shape[0], target_modules=["0"])
    wrapped = torch.nn.Sequential(linear)
    model = peft.get_peft_model(wrapped, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return layer


IMPLEMENTATIONS = {
    "limit": lambda: frozen,
    "ours": lambda: differentiated(grouped),
    "ours, one by one": lambda: differentiated(one_by_one),
    "eager": lambda: differentiated(eager),
    "PEFT, defaults": lambda: peft_of(True),
    "PEFT, bf16 adapters": lambda: peft_of(False),
    "torch.compile": lambda: differentiated(compiled(eager)),
}
PEERS = ("PEFT, defaults", "PEFT, bf16 adapters", "torch.compile")


@pytest.mark.parametrize("implementation", [peer(name) if name in PEERS else name for name in IMPLEMENTATIONS])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*distinct("d"), *WIDE])
def test_lora_linear(benchmark, name, dtype, case, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and case == "r=16")
    groups, rank = CASES[case]
    if groups == 1 and implementation == "ours, one by one":
        pytest.skip("one linear is a group of its own")
    if dtype == "float32" and (case != "r=16" or implementation == "PEFT, bf16 adapters"):
        pytest.skip("fp32 for one rank; PEFT's two settings differ for 16-bit models alone")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    frozen_counts = counts.frozen_linear(s.tokens, s.d, s.d, size)
    counted = counts.lora_linear(s.tokens, s.d, [s.d] * groups, [rank] * groups, size)
    is_limit = implementation == "limit"
    measure(
        benchmark,
        Case("lora_linear", name, s.tokens, dtype, device, case),
        implementation,
        IMPLEMENTATIONS[implementation](),
        functools.partial(inputs, s.d, groups, rank, getattr(torch, dtype), device),
        counts.total([frozen_counts] * groups) if is_limit else counted,
        None if is_limit else eager,
    )
