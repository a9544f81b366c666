"""LayerNorm and RMSNorm of a block: kept are the statistics, the output is made again from them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.ops.define import run


class Norm:
    """u = norm(x), for x (..., d). An RMSNorm of 16 bits returns 16 bits, also for a wider x."""

    def __init__(self, block: str, norm: nn.Module):
        self.mean, self.rstd = Place(block, "mean"), Place(block, "rstd")
        self.weight, self.centred = norm.weight, isinstance(norm, nn.LayerNorm)
        self.bias = norm.bias if self.centred else None
        self.eps = norm.eps if self.centred else norm.variance_epsilon
        self.bound = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        self.room: tuple[int, ...] = ()  # one number: columns that its output leaves free behind each row

    def named(self, block: str) -> Norm:
        """Returns the same norm for another place, whose statistics are kept under the name ``block``."""
        other = copy.copy(self)
        other.mean, other.rstd = Place(block, "mean"), Place(block, "rstd")
        return other

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.centred:
            u, mean, rstd = run("layer_norm", x, self.weight, self.bias, self.eps, call.backend, *self.room)
            call.keep(self.mean, mean)
        else:
            u, rstd = run("rms_norm", x, self.weight, self.eps, call.backend, *self.room)
        call.keep(self.rstd, rstd)
        return self._narrowed(u, x)

    def again(self, x: Tensor, call: Call) -> Tensor:
        rstd = call.kept[self.rstd.key]
        if self.centred:
            mean = call.kept[self.mean.key]
            own = self.weight, self.bias, call.backend, *self.room
            return run("layer_norm_from_statistics", x, mean, rstd, *own)
        return self._narrowed(run("rms_norm_from_statistics", x, rstd, self.weight, call.backend, *self.room), x)

    def forward_sum(self, y: Tensor, x: Tensor, rate: float, seed: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Returns h = x + drop(y) and norm(h)."""
        own = self.weight, self.bias, self.eps, rate, seed, self.centred
        h, u, mean, rstd = run("dropout_add_norm", y, x, *own, call.backend, *self.room)
        if self.centred:
            call.keep(self.mean, mean)
        call.keep(self.rstd, rstd)
        return h, self._narrowed(u, h)

    def backward_sum(
        self,
        du: Tensor,
        dh: Tensor | None,
        h: Tensor,
        dtype: torch.dtype | None,
        rate: float,
        seed: Tensor | None,
        call: Call,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of h, with ``dh`` from elsewhere in it, and of y in ``dtype``, of size 0 for None."""
        needs = gradients.wants(self.weight), gradients.wants(self.bias)
        mean = call.kept[self.mean.key] if self.centred else None
        own = mean, call.kept[self.rstd.key], self.weight
        dropout = dtype, rate, seed
        dh, dy, *found = run("dropout_add_norm_backward", du, dh, h, *own, *dropout, *needs, call.backend)
        if needs[0] or needs[1]:
            self._add(found, gradients)
        return dh, dy

    def backward(self, du: Tensor, dx: Tensor | None, x: Tensor, call: Call, gradients: Gradients) -> Tensor:
        """Returns the gradient of x, with ``dx`` from elsewhere in it."""
        return self.backward_sum(du, dx, x, None, 0.0, None, call, gradients)[0]

    def parameters_backward(self, du: Tensor, x: Tensor, call: Call, gradients: Gradients) -> None:
        """Adds the gradients of weight and bias alone."""
        needs = gradients.wants(self.weight), gradients.wants(self.bias)
        if not any(needs):
            return
        du, rstd = du.to(torch.promote_types(x.dtype, self.weight.dtype)), call.kept[self.rstd.key]
        if self.centred:
            own = call.kept[self.mean.key], rstd, self.weight, False, *needs
            _, *found = run("layer_norm_backward", du, x, *own, call.backend)
        else:
            _, *found = run("rms_norm_backward", du, x, rstd, self.weight, False, needs[0], call.backend)
        self._add(found, gradients)

    def _add(self, found: list[Tensor], gradients: Gradients) -> None:
        """``found``: gradients of weight and bias, of size 0 where they are not wanted."""
        for parameter, gradient in zip(self.bound, found, strict=False):
            gradients.add(parameter, gradient)

    def _narrowed(self, u: Tensor, x: Tensor) -> Tensor:
        narrow = not self.centred and self.weight.dtype.itemsize == 2 and self.weight.dtype != x.dtype
        return u.to(self.weight.dtype) if narrow else u
