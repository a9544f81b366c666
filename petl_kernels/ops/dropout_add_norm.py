"""Dropout of a sub-layer's output, added to the residual stream, and the norm that reads the sum: one pass each way.

    h          = residual + drop(y)
    u          = norm(h)                        LayerNorm, or RMSNorm where ``centred`` is false

    dh         = norm'(du) + dresidual          dresidual: the gradient of h from elsewhere, where there is one
    dy         = drop(dh)                       and the gradient of residual is dh itself
    dw, dv     as those of the norm

Formulas of the norms: ``petl_kernels/ops/layer_norm.py`` and ``rms_norm.py``. Every value has the bits that
``dropout_add`` and the norm give one after the other: h is rounded to its dtype before the norm reads it, norm'(du)
before dresidual is added, dh before it is dropped, and the mask is that of ``dropout_add`` with the same seed.

y, residual, h, u (..., d), w and v (d,). h has the wider of the dtypes of y and residual (under autocast the stream is
fp32 and y bf16), u that which h and w promote to, parameters any. Statistics and sums are fp32 (fp64 for fp64).

Saves: h, 8 bytes a token (mean and rstd; 4 for RMSNorm, which has no mean), 8 bytes in all for the seed. h is the
residual stream itself, which the next sum keeps alive anyway in most layers.
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
from petl_kernels.ops.checks import check_activation, check_parameter
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.dropout_add import check_residual
from petl_kernels.ops.dropout_add import reference as added
from petl_kernels.ops.dropout_add import reference_backward as dropped
from petl_kernels.ops.layer_norm import reference as layer_norm
from petl_kernels.ops.layer_norm import reference_backward as layer_norm_backward
from petl_kernels.ops.rms_norm import reference as rms_norm
from petl_kernels.ops.rms_norm import reference_backward as rms_norm_backward
from petl_kernels.ops.room import leaving_room, roomy


def dropout_add_norm(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns h = residual + drop(y) and u = norm(h); y, residual, h, u (..., d), weight and bias (d,).

    seed: int64 tensor of shape (1,) on y's device, drawn with ``philox.draw_seed`` when p > 0 and none is given.
    centred: LayerNorm; else RMSNorm, which has no bias.
    Raises InputError: y of rank 0 or not floating-point, a residual of another shape or device or not floating-point,
    p outside [0, 1), parameters of another shape, device or of an integer dtype, a bias without ``centred``.
    """
    op = "dropout_add_norm"
    check_activation(op, y, "y")
    check_residual(op, residual, y)
    check_parameter(op, "weight", weight, (y.shape[-1],), y)
    if bias is not None:
        if not centred:
            raise InputError(f"{op}: bias is given with centred=False: expected None, since RMSNorm has no bias")
        check_parameter(op, "bias", bias, (y.shape[-1],), y)
    seed = philox.seed_for(op, y, p, seed)
    return torch.ops.petl.dropout_add_norm(y, residual, weight, bias, eps, float(p), seed, centred, active())[:2]


@register("dropout_add_norm", "reference")
def reference(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = added(y, residual, p, seed)
    if centred:
        return h, *layer_norm(h, weight, bias, eps)
    u, rstd = rms_norm(h, weight, eps)
    return h, u, empty(rstd), rstd


@register("dropout_add_norm_backward", "reference")
def reference_backward(
    du: Tensor,
    dresidual: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    p: float,
    seed: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dh, dy, dweight, dbias), of size 0 where not needed.

    mean: None for RMSNorm. dtype: the dtype of dy, or None where dy is not needed, or would be dh itself.
    """
    dbias = empty(rstd)
    if mean is None:
        dh, dweight = rms_norm_backward(du, h, rstd, weight, True, need_dweight)
    else:
        needs = True, need_dweight, need_dbias
        dh, dweight, dbias = layer_norm_backward(du, h, mean, rstd, weight, *needs)
    dh = dh if dresidual is None else dh + dresidual
    dy = empty(dh) if dtype is None else dropped(dh, dtype, p, seed)
    return dh, dy, dweight, dbias


def _forward(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    centred: bool,
    backend: str,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = dispatch("dropout_add_norm", y.device, backend, y.dtype)
    return leaving_room(kernel, room, 1, y, residual, weight, bias, eps, p, seed, centred)


def _forward_fake(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    centred: bool,
    backend: str,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, residual.dtype))
    u = roomy(h, h.shape, room, torch.promote_types(h.dtype, weight.dtype))
    rstd = h.new_empty(h.shape[:-1], dtype=accumulate_dtype(h.dtype))
    return h, u, torch.empty_like(rstd) if centred else empty(rstd), rstd


def _backward(
    du: Tensor,
    dresidual: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    p: float,
    seed: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = dispatch("dropout_add_norm_backward", h.device, backend, dtype or h.dtype)
    return kernel(du, dresidual, h, mean, rstd, weight, dtype, p, seed, need_dweight, need_dbias)


def _backward_fake(
    du: Tensor,
    dresidual: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    p: float,
    seed: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dh = h.new_empty(h.shape)
    dy = empty(h) if dtype is None else h.new_empty(h.shape, dtype=dtype)
    return dh, dy, *(rstd.new_empty(h.shape[-1] if needed else 0) for needed in (need_dweight, need_dbias))


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    y, residual, weight, bias, _, ctx.p, seed, ctx.centred, ctx.backend = inputs
    h, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    ctx.save_for_backward(h, mean, rstd, weight, seed)
    ctx.dtype, ctx.residual_dtype = y.dtype, residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, needs: Sequence[Any], dh: Tensor | None, du: Tensor | None, *others: Any) -> tuple[Any, ...]:
    h, mean, rstd, weight, seed = ctx.saved_tensors
    need_dy, need_dresidual, need_dweight, need_dbias, *_ = needs
    writes_dy = need_dy and (ctx.p > 0 or ctx.dtype != h.dtype)
    dy = dweight = dbias = None
    if du is not None:
        dh, dy, dweight, dbias = torch.ops.petl.dropout_add_norm_backward(
            du, dh, h, mean if ctx.centred else None, rstd, weight, ctx.dtype if writes_dy else None, ctx.p, seed,
            need_dweight, need_dbias, ctx.backend,
        )  # fmt: skip
    elif dh is not None and ctx.p > 0 and need_dy:
        dy = torch.ops.petl.dropout_add_backward(dh, ctx.dtype, ctx.p, seed, ctx.backend)
    if dh is None:
        return (None,) * 9
    dy = dy if dy is not None and writes_dy else dh.to(ctx.dtype)
    return (
        dy if need_dy else None,
        dh.to(ctx.residual_dtype) if need_dresidual else None,
        dweight.to(weight.dtype) if need_dweight and dweight is not None else None,
        dbias.to(ctx.bias_dtype) if need_dbias and dbias is not None else None,
        *(None,) * 5,
    )


define(
    "dropout_add_norm",
    "(Tensor y, Tensor residual, Tensor weight, Tensor? bias, float eps, float p, Tensor? seed, bool centred,"
    " str backend, int room=0) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "dropout_add_norm_backward",
    "(Tensor du, Tensor? dresidual, Tensor h, Tensor? mean, Tensor rstd, Tensor weight, ScalarType? dtype, float p,"
    " Tensor? seed, bool need_dweight, bool need_dbias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("dropout_add_norm", _save, _gradients)
