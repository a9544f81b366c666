"""lora_border as a layer runs it, with LoRA on q and v, beside the frozen q, k and v in one product (the limit).

The rows that the norm and the attention leave room behind are there already; "ours, apart" is lora_linear and
frozen_linear with the sum of their gradients, as a layer without a border runs them.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.measure import measure
from bench.run.peers import require
from bench.run.work import Case, Work, differentiated
from bench.shapes import WIDE, distinct, shape
from petl_kernels import ops
from petl_kernels.ops.define import below_autograd, run
from petl_kernels.ops.lora_border import room

RANK = 16


def inputs(d: int, dtype: torch.dtype, device: str, tokens: int):
    new = functools.partial(torch.randn, device=device)
    x = new(tokens, d, dtype=dtype, requires_grad=True)
    weights, biases = [(new(d, d) / d**0.5).to(dtype) for _ in range(3)], [new(d, dtype=dtype) for _ in range(3)]
    a = [(new(RANK, d) / d**0.5).requires_grad_() for _ in range(2)]
    b = [(new(d, RANK) / RANK**0.5).requires_grad_() for _ in range(2)]
    return x, *weights, *biases, *a, *b


def eager(x, *tensors):
    weights, biases, a, b = tensors[:3], tensors[3:6], tensors[6:8], tensors[8:]
    ys = [F.linear(x, w, c) for w, c in zip(weights, biases, strict=True)]
    for g, (a_g, b_g) in enumerate(zip(a, b, strict=True)):
        ys[2 * g] = ys[2 * g] + F.linear(F.linear(x, a_g.to(x.dtype)), b_g.to(x.dtype))
    return ys


def apart(x, *tensors):
    weights, biases, a, b = (list(part) for part in (tensors[:3], tensors[3:6], tensors[6:8], tensors[8:]))
    q, v = ops.lora_linear_grouped(x, weights[::2], biases[::2], a, b, [1.0, 1.0])
    return [q, ops.frozen_linear(x, weights[1], biases[1]), v]


class _Border(torch.autograd.Function):
    """Calls the op once each way; rows with room are made once, ahead of the timed calls."""

    @staticmethod
    def forward(ctx, given: dict, x, *adapters):
        ctx.given = given
        with below_autograd(x.device.type):
            y, ctx.s = run("lora_border", given["x"], given["border"], given["bias"], *given["own"], "")
        return y.chunk(3, 1)

    @staticmethod
    def backward(ctx, *dys):
        given, d = ctx.given, ctx.given["d"]
        if given["dy"] is None:
            given["dy"] = F.pad(torch.cat(dys, 1), (0, room(2 * RANK)))
        with below_autograd(dys[0].device.type):
            rows, own = given["x"][:, :d], given["own"][1:]
            dx, da, db, _ = run(
                "lora_border_backward", given["dy"], rows, ctx.s, given["border"], *own, True, [False] * 3, ""
            )
        return None, dx, da[0], da[2], db[0], db[2]


def border(x, *tensors) -> Work:
    d, r = x.shape[1], room(2 * RANK)
    weights, biases, a, b = (list(part) for part in (tensors[:3], tensors[3:6], tensors[6:8], tensors[8:]))
    stacked = x.detach().new_zeros(3 * d + r, d + r)
    stacked[: 3 * d, :d] = torch.cat(weights)
    a_all, b_all = [a[0], x.new_empty(0, d), a[1]], [b[0], x.new_empty(d, 0), b[1]]
    own = [c.detach() for c in biases], a_all, b_all, [1.0] * 3
    given = {"x": F.pad(x.detach(), (0, r)), "border": stacked, "bias": x.new_empty(3 * d), "own": own}
    given |= {"d": d, "dy": None}
    return Work(lambda: list(_Border.apply(given, x, *a, *b)), (x, *a, *b))


def fused(x, *tensors) -> Work:
    weight, bias = torch.cat(tensors[:3]), torch.cat(tensors[3:6])
    return Work(lambda: F.linear(x, weight, bias), (x,))


IMPLEMENTATIONS = {"limit": fused, "ours": border, "ours, apart": differentiated(apart), "eager": differentiated(eager)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*distinct("d"), *WIDE])
def test_lora_border(benchmark, name, implementation, device):
    if device == "cpu":
        pytest.skip("no layer has a border on a CPU")
    require(name, device, implementation)
    s = shape(name, device)
    counted = counts.lora_border(s.tokens, s.d, [s.d] * 3, [RANK, 0, RANK], 2)
    limit = counts.frozen_linear(s.tokens, 3 * s.d, s.d, 2)
    measure(
        benchmark,
        Case("lora_border", name, s.tokens, "bfloat16", device, f"r={RANK} q/v"),
        implementation,
        IMPLEMENTATIONS[implementation],
        functools.partial(inputs, s.d, torch.bfloat16, device),
        limit if implementation == "limit" else counted,
        None if implementation == "limit" else eager,
    )
