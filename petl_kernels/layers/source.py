"""The encoder's output as the cross-attentions of all decoder layers read it."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_for_products(x: Tensor) -> Tensor:
    """Returns x in the dtype that autocast gives to matrix products; x itself outside of autocast and in float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def shared_for_products(source: Tensor | None) -> Tensor | None:
    """Returns ``source`` (batch, source tokens, d) cast for products, in one storage for all decoder layers.

    Each layer's gradient is added up in the dtype of ``source``, as if each layer had cast it for itself.
    """
    if source is None or cast_for_products(source) is source:
        return source
    if source.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return cast_for_products(source)
    key = source._version, torch.get_autocast_dtype(source.device.type)
    known, cast = getattr(source, "petl_cast", (None, None))  # on the tensor, so that it goes when the tensor goes
    if known != key:
        cast = cast_for_products(source.detach())
        source.petl_cast = key, cast  # pyright: ignore[reportAttributeAccessIssue]  kept on the tensor
    return _SharedCast.apply(source, cast)


class _SharedCast(torch.autograd.Function):
    """Puts ``cast``, which is in memory already, in the place of ``source`` cast to its dtype."""

    @staticmethod
    def forward(ctx, source: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
