"""A linear layer whose weight is frozen.

    y     = x Wᵀ + c
    dx    = dy W
    dc    = Σ_tokens dy          (fp32 sums, in the bias' dtype)

x (..., K), W (N, K), c (N,) or None, y (..., N); x and W of one dtype (bf16, fp16, fp32, fp64), c of any. W may be
quantized (``ops/quantized``): the products are then those of that file.

Saves: 0 bytes per token. ``nn.Linear`` keeps x (2K bytes in bf16) whenever its weight could need a gradient.
Source: the derivative of a matrix product with dW left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, prefer, register
from petl_kernels.ops.checks import check_activation, check_parameter, check_weight
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.quantized.products import project, project_back
from petl_kernels.ops.quantized.storage import in_features, is_quantized, out_features
from petl_kernels.ops.quantized.tensor import parts_of, takes_quantized

# cuBLAS already runs a frozen linear layer at the speed of the hardware.
prefer("frozen_linear", "cuda", "reference")


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns y = x Wᵀ + c for a frozen ``weight`` (N, K); x (..., K) -> (..., N). ``bias`` may be trained.

    Raises InputError: x of rank 0, shapes that do not fit, devices or dtypes that differ, a weight that requires grad.
    """
    check_activation("frozen_linear", x)
    check_weight("frozen_linear", "weight", weight, x)
    if bias is not None:
        check_parameter("frozen_linear", "bias", bias, (weight.shape[0],), x)
    return torch.ops.petl.frozen_linear(x, parts_of(weight), bias, active())


@takes_quantized(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return frozen_linear(input, weight, bias)


@register("frozen_linear", "reference")
def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@register("frozen_linear_backward", "reference")
def reference_backward(dy: Tensor, weight: Tensor, need_dx: bool, need_dbias: bool) -> tuple[Tensor, Tensor]:
    rows = dy.reshape(-1, dy.shape[-1])
    dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]) if need_dx else empty(dy)
    dbias = rows.sum(0, dtype=accumulate_dtype(dy.dtype)) if need_dbias else empty(dy)
    return dx, dbias


def _forward(x: Tensor, weight: list[Tensor], bias: Tensor | None, backend: str) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if is_quantized(weight):
        y = project(x.reshape(-1, x.shape[-1]), weight, bias, backend)
        return y.view(*x.shape[:-1], y.shape[-1])
    return dispatch("frozen_linear", x.device, backend, x.dtype)(x, weight[0].to(x.dtype), bias)


def _forward_fake(x: Tensor, weight: list[Tensor], bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features(weight, x.shape[-1]))


def _backward(dy: Tensor, weight: list[Tensor], need_dx: bool, need_dbias: bool, backend: str) -> tuple[Tensor, Tensor]:
    kernel = dispatch("frozen_linear_backward", dy.device, backend, dy.dtype)
    if is_quantized(weight):
        dx = empty(dy)
        if need_dx:
            dx = project_back(dy.reshape(-1, dy.shape[-1]), weight, backend)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        _, dbias = kernel(dy, empty(dy), False, need_dbias)
    else:
        dx, dbias = kernel(dy, weight[0].to(dy.dtype), need_dx, need_dbias)
    return dx, dbias


def _backward_fake(
    dy: Tensor, weight: list[Tensor], need_dx: bool, need_dbias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], in_features(weight, dy.shape[-1])) if need_dx else empty(dy)
    return dx, dy.new_empty(dy.shape[-1], dtype=accumulate_dtype(dy.dtype)) if need_dbias else empty(dy)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    _, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(*weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    weight = list(ctx.saved_tensors)
    need_dx, _, need_dbias, _ = needs
    dx, dbias = torch.ops.petl.frozen_linear_backward(dy, weight, need_dx, need_dbias, ctx.backend)
    return dx if need_dx else None, [None] * len(weight), dbias.to(ctx.bias_dtype) if need_dbias else None, None


define(
    "frozen_linear",
    "(Tensor x, Tensor[] weight, Tensor? bias, str backend) -> Tensor",
    _forward,
    _forward_fake,
    autocast=(0,),
)
define(
    "frozen_linear_backward",
    "(Tensor dy, Tensor[] weight, bool need_dx, bool need_dbias, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("frozen_linear", _save, _gradients)
