"""A bottleneck adapter with its LayerNorm and its residual.

    h     = LN(x) = (x - mean) · rstd · w + v        (x itself without a LayerNorm)
    z     = h Dᵀ + d
    y     = res + scale · (act(z) Uᵀ + u)            (res = x, or another tensor for the parallel form)

    dU    = scale · dyᵀ act(z)          du = scale · Σ_tokens dy
    dz    = scale · (dy U) ⊙ act'(z)
    dD    = dzᵀ h                       dd = Σ_tokens dz
    dh    = dz D
    dw    = Σ_tokens dh ⊙ x̂             dv = Σ_tokens dh            with x̂ = (x - mean) · rstd
    dx    = rstd · (g - mean(g) - x̂ · mean(g ⊙ x̂)), g = dh ⊙ w     (+ dy when res is x)

x and res (..., d), w, v, u (d,), D (m, d), d (m,), U (d, m), y (..., d); act as in ``activation``. x is bf16,
fp16, fp32 or fp64; the parameters may be wider: they are cast to x.dtype for the products, statistics and sums are
fp32, and gradients come back in each parameter's dtype.

Saves: x (2d bytes per token in bf16), which the residual keeps anyway. The rest is recomputed: m/d of extra work.
Source: Bapna and Firat, arXiv 1909.08478; parallel form: He et al., arXiv 2110.04366.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.activation import ACTIVATIONS, check_kind, derivative
from petl_kernels.ops.checks import autocasts, check_activation, check_device, check_parameter, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty


def bottleneck_adapter(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
    scale: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Returns y = residual + scale · (act(LN(x) Dᵀ + d) Uᵀ + u); x (..., d) -> (..., d).

    down (m, d), up (d, m), biases (m,) and (d,) or None; without ``ln_weight`` there is no LayerNorm; residual (..., d)
    is x by default. Raises InputError: x of rank 0, shapes that do not fit, devices that differ, a residual of another
    dtype, an unknown activation.
    """
    _check(x, down, down_bias, up, up_bias, ln_weight, ln_bias, activation, residual)
    return torch.ops.petl.bottleneck_adapter(
        x, residual, ln_weight, ln_bias, down, down_bias, up, up_bias, eps, activation, float(scale), active()
    )


def _check(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    op = "bottleneck_adapter"
    check_activation(op, x)
    d = x.shape[-1]
    if down.dim() != 2:
        raise InputError(f"{op}: down has shape {shape(down)}: expected (bottleneck, {d})")
    m = down.shape[0]
    expected = {
        "down": (down, (m, d)),
        "down_bias": (down_bias, (m,)),
        "up": (up, (d, m)),
        "up_bias": (up_bias, (d,)),
        "ln_weight": (ln_weight, (d,)),
        "ln_bias": (ln_bias, (d,)),
    }
    for name, (parameter, size) in expected.items():
        if parameter is not None:
            check_parameter(op, name, parameter, size, x)
    if ln_bias is not None and ln_weight is None:
        raise InputError(f"{op}: ln_bias is given and ln_weight is None: expected both or none")
    check_kind(op, activation)
    if residual is not None:
        if residual.shape != x.shape or (residual.dtype != x.dtype and not autocasts(x)):
            raise InputError(
                f"{op}: residual is {residual.dtype} of shape {shape(residual)}: expected {x.dtype} of {shape(x)}"
            )
        check_device(op, "residual", residual, x)


@register("bottleneck_adapter", "reference")
def reference(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    eps: float,
    activation: str,
    scale: float,
) -> Tensor:
    h = x if ln_weight is None else _layer_norm(x, ln_weight, ln_bias, eps)
    z = F.linear(h, down.to(x.dtype), _to(down_bias, x.dtype))
    y = F.linear(ACTIVATIONS[activation](z), up.to(x.dtype), _to(up_bias, x.dtype))
    return ((x if residual is None else residual) + scale * y).contiguous()


@register("bottleneck_adapter_backward", "reference")
def reference_backward(
    dy: Tensor,
    x: Tensor,
    residual_is_x: bool,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    eps: float,
    activation: str,
    scale: float,
    need_dx: bool,
    has_up_bias: bool,
):
    sums = accumulate_dtype(x.dtype)
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    h = rows if ln_weight is None else _layer_norm(rows, ln_weight, ln_bias, eps)
    z = F.linear(h, down.to(x.dtype), _to(down_bias, x.dtype))

    dup = scale * (dy_rows.T @ ACTIVATIONS[activation](z))
    dup_bias = scale * dy_rows.sum(0, dtype=sums) if has_up_bias else empty(x)
    dz = scale * (dy_rows @ up.to(x.dtype))
    dz = (dz.to(sums) * derivative(activation, z.to(sums))).to(x.dtype)
    ddown = dz.T @ h
    ddown_bias = empty(x) if down_bias is None else dz.sum(0, dtype=sums).to(down_bias.dtype)

    dx, dln_weight, dln_bias = empty(x), empty(x), empty(x)
    if need_dx or ln_weight is not None:
        dh = dz @ down.to(x.dtype)
        dx = dh
        if ln_weight is not None:
            dx, dln_weight, dln_bias = _layer_norm_backward(dh, rows, ln_weight, ln_bias, eps)
        dx = ((dx + dy_rows) if residual_is_x else dx).to(x.dtype).view(x.shape) if need_dx else empty(x)
    return dx, dln_weight, dln_bias, ddown.to(down.dtype), ddown_bias, dup.to(up.dtype), dup_bias


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    sums = accumulate_dtype(x.dtype)
    return F.layer_norm(x.to(sums), x.shape[-1:], weight.to(sums), _to(bias, sums), eps).to(x.dtype)


def _layer_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
    """Returns (dx in fp32, dweight, dbias) of rows x (tokens, d)."""
    sums = accumulate_dtype(x.dtype)
    x, dh = x.to(sums), dh.to(sums)
    centred = x - x.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    g = dh * weight.to(sums)
    dx = rstd * (g - g.mean(1, keepdim=True) - normalised * (g * normalised).mean(1, keepdim=True))
    dweight = (dh * normalised).sum(0).to(weight.dtype)
    return dx, dweight, empty(x) if bias is None else dh.sum(0).to(bias.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    eps: float,
    activation: str,
    scale: float,
    backend: str,
) -> Tensor:
    kernel = dispatch("bottleneck_adapter", x.device, backend, x.dtype)
    return kernel(x, residual, ln_weight, ln_bias, down, down_bias, up, up_bias, eps, activation, scale)


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    eps: float,
    activation: str,
    scale: float,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor,
    x: Tensor,
    residual_is_x: bool,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    eps: float,
    activation: str,
    scale: float,
    need_dx: bool,
    has_up_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    kernel = dispatch("bottleneck_adapter_backward", x.device, backend, x.dtype)
    dx, *grads = kernel(
        dy,
        x,
        residual_is_x,
        ln_weight,
        ln_bias,
        down,
        down_bias,
        up,
        eps,
        activation,
        scale,
        need_dx,
        has_up_bias,
    )
    sums = accumulate_dtype(x.dtype)
    dtypes = [sums if p is None else p.dtype for p in (ln_weight, ln_bias, down, down_bias, up, None)]
    return dx, *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    residual_is_x: bool,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    eps: float,
    activation: str,
    scale: float,
    need_dx: bool,
    has_up_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    sums = accumulate_dtype(x.dtype)
    grads = [
        x.new_empty(0, dtype=sums) if p is None else p.new_empty(p.shape)
        for p in (ln_weight, ln_bias, down, down_bias, up)
    ]
    dx = x.new_empty(x.shape) if need_dx else empty(x)
    return dx, *grads, x.new_empty(x.shape[-1] if has_up_bias else 0, dtype=sums)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, residual, ln_weight, ln_bias, down, down_bias, up, up_bias, *options = inputs
    ctx.eps, ctx.activation, ctx.scale, ctx.backend = options
    ctx.residual_is_x = residual is None
    ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
    ctx.save_for_backward(x, ln_weight, ln_bias, down, down_bias, up)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    x, ln_weight, ln_bias, down, down_bias, up = ctx.saved_tensors
    has_up_bias = ctx.up_bias_dtype is not None
    dx, dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias = torch.ops.petl.bottleneck_adapter_backward(
        dy,
        x,
        ctx.residual_is_x,
        ln_weight,
        ln_bias,
        down,
        down_bias,
        up,
        ctx.eps,
        ctx.activation,
        ctx.scale,
        needs[0],
        has_up_bias,
        ctx.backend,
    )
    dresidual = None if ctx.residual_is_x else dy
    dup_bias = dup_bias.to(ctx.up_bias_dtype) if has_up_bias else None
    grads = (dx, dresidual, dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias)
    wanted = (grad if need else None for grad, need in zip(grads, needs[:8], strict=True))
    return *wanted, None, None, None, None


define(
    "bottleneck_adapter",
    "(Tensor x, Tensor? residual, Tensor? ln_weight, Tensor? ln_bias, Tensor down, Tensor? down_bias, Tensor up,"
    " Tensor? up_bias, float eps, str activation, float scale, str backend) -> Tensor",
    _forward,
    _forward_fake,
    autocast=(0, 1),
)
define(
    "bottleneck_adapter_backward",
    "(Tensor dy, Tensor x, bool residual_is_x, Tensor? ln_weight, Tensor? ln_bias, Tensor down, Tensor? down_bias,"
    " Tensor up, float eps, str activation, float scale, bool need_dx, bool has_up_bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("bottleneck_adapter", _save, _gradients)
