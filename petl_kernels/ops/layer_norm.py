"""LayerNorm, whose output can be made again from its input and two numbers per token.

    x̂     = (x - mean) · rstd           mean = Σ x / d        rstd = (Σ (x - mean)² / d + eps)^(-1/2)
    y     = x̂ ⊙ w + v

    g     = dy ⊙ w
    dx    = rstd · (g - mean(g) - x̂ · mean(g ⊙ x̂))
    dw    = Σ_tokens dy ⊙ x̂             dv = Σ_tokens dy

x and y (..., d), w and v (d,) (v may be absent), mean and rstd (...). x is bf16, fp16, fp32 or fp64, the parameters
of any dtype; y has the dtype that x and w promote to. Statistics and sums are fp32 (fp64 for fp64).

Saves: x, and 8 bytes per token (mean and rstd in fp32). Never y: x̂ comes from x, so a gain of zero does no harm, and
where x is kept anyway (a residual) or is another layer's to keep, the norm costs its 8 bytes.
Source: Ba et al., arXiv 1607.06450; the backward is its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.checks import check_activation, check_device, check_parameter, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.room import leaving_room, roomy


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Returns y = (x - mean) · rstd ⊙ w + v over the last dimension; x (..., d), weight and bias (d,), each may be
    trained.

    Raises InputError: x of rank 0, shapes that do not fit, devices that differ, parameters of an integer dtype.
    """
    return layer_norm_with_statistics(x, weight, bias, eps)[0]


def layer_norm_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, mean, rstd), for a layer that makes y again by ``layer_norm_from_statistics``.

    No gradient flows through mean (...) and rstd (...).
    """
    _check("layer_norm", x, weight, bias)
    return torch.ops.petl.layer_norm(x, weight, bias, eps, active())


def layer_norm_from_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Returns the y of ``layer_norm``, bit for bit, for backward passes: it has no gradient of its own."""
    _check("layer_norm", x, weight, bias)
    check_statistics("layer_norm", x, mean=mean, rstd=rstd)
    return torch.ops.petl.layer_norm_from_statistics(x, mean, rstd, weight, bias, active())


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_activation(op, x)
    check_parameter(op, "weight", weight, (x.shape[-1],), x)
    if bias is not None:
        check_parameter(op, "bias", bias, (x.shape[-1],), x)


def check_statistics(op: str, x: Tensor, **statistics: Tensor) -> None:
    """Refuses statistics that are not one number for each token of x in the dtype of sums."""
    for name, statistic in statistics.items():
        dtype = accumulate_dtype(x.dtype)
        if statistic.shape != x.shape[:-1] or statistic.dtype != dtype:
            raise InputError(
                f"{op}: {name} is {statistic.dtype} of shape {shape(statistic)}:"
                f" expected {dtype} of {tuple(x.shape[:-1])}"
            )
        check_device(op, name, statistic, x)


@register("layer_norm", "reference")
def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x.dtype))
    mean = wide.mean(-1)
    rstd = ((wide - mean.unsqueeze(-1)).square().mean(-1) + eps).rsqrt()
    return reference_from_statistics(x, mean, rstd, weight, bias), mean, rstd


@register("layer_norm_from_statistics", "reference", op="layer_norm")
def reference_from_statistics(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _normalise(x, mean, rstd) * weight.to(mean.dtype)
    y = y if bias is None else y + bias.to(mean.dtype)
    return y.to(torch.promote_types(x.dtype, weight.dtype)).contiguous()


@register("layer_norm_backward", "reference")
def reference_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    normalised, dy = _normalise(x, mean, rstd), dy.to(mean.dtype)
    dx, dweight, dbias = empty(x), empty(mean), empty(mean)
    if need_dx:
        g = dy * weight.to(mean.dtype)
        along = (g * normalised).mean(-1, keepdim=True)
        dx = (rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - normalised * along)).to(x.dtype).contiguous()
    if need_dweight:
        dweight = (dy * normalised).reshape(-1, x.shape[-1]).sum(0)
    if need_dbias:
        dbias = dy.reshape(-1, x.shape[-1]).sum(0)
    return dx, dweight, dbias


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = dispatch("layer_norm", x.device, backend, x.dtype)
    return leaving_room(kernel, room, 0, x, weight, bias, eps)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str, room: int = 0
) -> tuple[Tensor, ...]:
    y = roomy(x, x.shape, room, torch.promote_types(x.dtype, weight.dtype))
    statistics = [x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype)) for _ in range(2)]
    return y, *statistics


def _from_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, backend: str, room: int = 0
) -> Tensor:
    kernel = dispatch("layer_norm_from_statistics", x.device, backend, x.dtype)
    return leaving_room(kernel, room, None, x, mean, rstd, weight, bias)


def _from_statistics_fake(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, backend: str, room: int = 0
) -> Tensor:
    return roomy(x, x.shape, room, torch.promote_types(x.dtype, weight.dtype))


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = dispatch("layer_norm_backward", x.device, backend, x.dtype)
    return kernel(dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dx = x.new_empty(x.shape) if need_dx else empty(x)
    sums = [mean.new_empty(x.shape[-1] if needed else 0) for needed in (need_dweight, need_dbias)]
    return dx, *sums


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, weight, bias, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor | None, *others: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    x, mean, rstd, weight = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, *_ = needs
    dx, dweight, dbias = torch.ops.petl.layer_norm_backward(
        dy, x, mean, rstd, weight, need_dx, need_dweight, need_dbias, ctx.backend
    )
    return (
        dx if need_dx else None,
        dweight.to(weight.dtype) if need_dweight else None,
        dbias.to(ctx.bias_dtype) if need_dbias else None,
        None,
        None,
    )


define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, str backend, int room=0) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "layer_norm_from_statistics",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? bias, str backend, int room=0) -> Tensor",
    _from_statistics,
    _from_statistics_fake,
)
define(
    "layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("layer_norm", _save, _gradients)
