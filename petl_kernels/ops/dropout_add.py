"""Dropout of a sub-layer's output, added to the residual stream.

    y          = residual + drop(x)
    dx         = drop(dy)
    dresidual  = dy

x, residual, y (..., features); y has the wider of the two dtypes (under autocast the stream is fp32 and x bf16), and
the sum is rounded to it once. The dropout mask is recomputed from a seed (``petl_kernels/ops/philox.py``).

Saves: 8 bytes in all for the seed. ``F.dropout`` keeps a byte (on a CPU: a whole element) an element.
Source: the derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.checks import check_activation, check_device, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Returns residual + drop(x), a plain addition with p = 0; (..., features) -> (..., features).

    seed: int64 tensor of shape (1,) on x's device, drawn with ``philox.draw_seed`` when p > 0 and none is given.
    Raises InputError: x of rank 0 or not floating-point, a residual of another shape or device or not floating-point,
    p outside [0, 1).
    """
    check_activation("dropout_add", x)
    check_residual("dropout_add", residual, x)
    seed = philox.seed_for("dropout_add", x, p, seed)
    if p == 0:
        return residual + x
    return torch.ops.petl.dropout_add(x, residual, float(p), seed, active())


def check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    """Refuses a residual that is not a floating-point tensor of the shape and on the device of x."""
    if residual.shape != x.shape or not residual.is_floating_point():
        raise InputError(
            f"{op}: residual is {residual.dtype} of shape {shape(residual)}: expected a floating-point tensor "
            f"of {shape(x)}"
        )
    check_device(op, "residual", residual, x)


@register("dropout_add", "reference")
def reference(x: Tensor, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    dropped = philox.dropout(x.reshape(-1, x.shape[-1]).to(accumulate_dtype(dtype)), p, seed)
    return (residual + dropped.view(x.shape)).to(dtype).contiguous()


@register("dropout_add_backward", "reference")
def reference_backward(dy: Tensor, dtype: torch.dtype, p: float, seed: Tensor | None) -> Tensor:
    rows = dy.reshape(-1, dy.shape[-1]).to(accumulate_dtype(dy.dtype))
    return philox.dropout(rows, p, seed).to(dtype).view(dy.shape)


def _forward(x: Tensor, residual: Tensor, p: float, seed: Tensor, backend: str) -> Tensor:
    return dispatch("dropout_add", x.device, backend, x.dtype)(x, residual, p, seed)


def _forward_fake(x: Tensor, residual: Tensor, p: float, seed: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _backward(dy: Tensor, dtype: torch.dtype, p: float, seed: Tensor, backend: str) -> Tensor:
    return dispatch("dropout_add_backward", dy.device, backend, dtype)(dy, dtype, p, seed)


def _backward_fake(dy: Tensor, dtype: torch.dtype, p: float, seed: Tensor, backend: str) -> Tensor:
    return dy.new_empty(dy.shape, dtype=dtype)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, residual, ctx.p, seed, ctx.backend = inputs
    ctx.dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.save_for_backward(seed)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    need_dx, need_dresidual, *_ = needs
    dx = torch.ops.petl.dropout_add_backward(dy, ctx.dtype, ctx.p, seed, ctx.backend) if need_dx else None
    return dx, dy.to(ctx.residual_dtype) if need_dresidual else None, None, None, None


define(
    "dropout_add",
    "(Tensor x, Tensor residual, float p, Tensor seed, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "dropout_add_backward",
    "(Tensor dy, ScalarType dtype, float p, Tensor seed, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
differentiate("dropout_add", _save, _gradients)
