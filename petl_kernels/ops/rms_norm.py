"""RMSNorm as T5 has it (no mean, no bias), whose output can be made again from its input and one number per token.

    x̂     = x · rstd                    rstd = (Σ x² / d + eps)^(-1/2)
    y     = x̂ ⊙ w

    g     = dy ⊙ w
    dx    = rstd · (g - x̂ · mean(g ⊙ x̂))
    dw    = Σ_tokens dy ⊙ x̂

x and y (..., d), w (d,), rstd (...). x is bf16, fp16, fp32 or fp64, w of any dtype; y has the dtype that x and w
promote to and is rounded once (T5's own layer rounds x̂ to w's dtype before the gain). Statistics and sums are fp32
(fp64 for fp64).

Saves: x, and 4 bytes per token (rstd in fp32). Never y: x̂ comes from x, so a gain of zero does no harm.
Source: Zhang and Sennrich, arXiv 1910.07467; the backward is its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.ops.checks import check_activation, check_parameter
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.layer_norm import check_statistics
from petl_kernels.ops.room import leaving_room, roomy


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns y = x · rstd ⊙ w over the last dimension; x (..., d), weight (d,), which may be trained.

    Raises InputError: x of rank 0, shapes that do not fit, devices that differ, a weight of an integer dtype.
    """
    return rms_norm_with_statistics(x, weight, eps)[0]


def rms_norm_with_statistics(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns (y, rstd), for a layer that makes y again by ``rms_norm_from_statistics``; rstd (...) has no gradient."""
    _check(x, weight)
    return torch.ops.petl.rms_norm(x, weight, eps, active())


def rms_norm_from_statistics(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Returns the y of ``rms_norm``, bit for bit, for backward passes: it has no gradient of its own."""
    _check(x, weight)
    check_statistics("rms_norm", x, rstd=rstd)
    return torch.ops.petl.rms_norm_from_statistics(x, rstd, weight, active())


def _check(x: Tensor, weight: Tensor) -> None:
    check_activation("rms_norm", x)
    check_parameter("rms_norm", "weight", weight, (x.shape[-1],), x)


@register("rms_norm", "reference")
def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (x.to(accumulate_dtype(x.dtype)).square().mean(-1) + eps).rsqrt()
    return reference_from_statistics(x, rstd, weight), rstd


@register("rms_norm_from_statistics", "reference", op="rms_norm")
def reference_from_statistics(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    y = x.to(rstd.dtype) * rstd.unsqueeze(-1) * weight.to(rstd.dtype)
    return y.to(torch.promote_types(x.dtype, weight.dtype)).contiguous()


@register("rms_norm_backward", "reference")
def reference_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    normalised, dy = x.to(rstd.dtype) * rstd.unsqueeze(-1), dy.to(rstd.dtype)
    dx, dweight = empty(x), empty(rstd)
    if need_dx:
        g = dy * weight.to(rstd.dtype)
        along = (g * normalised).mean(-1, keepdim=True)
        dx = (rstd.unsqueeze(-1) * (g - normalised * along)).to(x.dtype).contiguous()
    if need_dweight:
        dweight = (dy * normalised).reshape(-1, x.shape[-1]).sum(0)
    return dx, dweight


def _forward(x: Tensor, weight: Tensor, eps: float, backend: str, room: int = 0) -> tuple[Tensor, Tensor]:
    kernel = dispatch("rms_norm", x.device, backend, x.dtype)
    return leaving_room(kernel, room, 0, x, weight, eps)


def _forward_fake(x: Tensor, weight: Tensor, eps: float, backend: str, room: int = 0) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))
    return _from_statistics_fake(x, rstd, weight, backend, room), rstd


def _from_statistics(x: Tensor, rstd: Tensor, weight: Tensor, backend: str, room: int = 0) -> Tensor:
    kernel = dispatch("rms_norm_from_statistics", x.device, backend, x.dtype)
    return leaving_room(kernel, room, None, x, rstd, weight)


def _from_statistics_fake(x: Tensor, rstd: Tensor, weight: Tensor, backend: str, room: int = 0) -> Tensor:
    return roomy(x, x.shape, room, torch.promote_types(x.dtype, weight.dtype))


def _backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return dispatch("rms_norm_backward", x.device, backend, x.dtype)(dy, x, rstd, weight, need_dx, need_dweight)


def _backward_fake(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape) if need_dx else empty(x)
    return dx, rstd.new_empty(x.shape[-1] if need_dweight else 0)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    ctx.save_for_backward(x, rstd, weight)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 4
    x, rstd, weight = ctx.saved_tensors
    need_dx, need_dweight, *_ = needs
    dx, dweight = torch.ops.petl.rms_norm_backward(dy, x, rstd, weight, need_dx, need_dweight, ctx.backend)
    return dx if need_dx else None, dweight.to(weight.dtype) if need_dweight else None, None, None


define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, str backend, int room=0) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "rms_norm_from_statistics",
    "(Tensor x, Tensor rstd, Tensor weight, str backend, int room=0) -> Tensor",
    _from_statistics,
    _from_statistics_fake,
)
define(
    "rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor rstd, Tensor weight, bool need_dx, bool need_dweight, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("rms_norm", _save, _gradients)
