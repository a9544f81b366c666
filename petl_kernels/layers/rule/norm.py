"""LayerNorm and RMSNorm of a block. Their statistics are saved, and the output is recomputed from these.

An RMSNorm of ``OFFSET_NORMS`` multiplies by 1 + weight; that sum is made anew for each pass.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.models.transformers_names import OFFSET_NORMS
from petl_kernels.ops.define import accumulate_dtype, run


class Norm:
    """u = norm(x), for x (..., d).

    An RMSNorm of 16 bits returns 16 bits, also for a wider x; one with an offset returns the dtype of x.
    """

    def __init__(self, block: str, norm: Any):
        self.mean, self.rstd = Place(block, "mean"), Place(block, "rstd")
        self.centred = isinstance(norm, nn.LayerNorm)
        self.weight: Tensor = norm.weight
        self.bias: Tensor | None = norm.bias if self.centred else None
        self.offset = type(norm).__name__ in OFFSET_NORMS
        self.eps: float = norm.eps if self.centred or self.offset else norm.variance_epsilon
        self.bound = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        self.room: tuple[int, ...] = ()  # one number: free columns behind each row of the output

    def named(self, block: str) -> Norm:
        """Returns the same norm at another place, whose statistics are saved under the name ``block``."""
        other = copy.copy(self)
        other.mean, other.rstd = Place(block, "mean"), Place(block, "rstd")
        return other

    @property
    def gain(self) -> Tensor:
        """What the normalised x is multiplied by."""
        return 1 + self.weight.to(accumulate_dtype(self.weight.dtype)) if self.offset else self.weight

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """Returns u, and saves the statistics."""
        if self.centred:
            u, mean, rstd = run("layer_norm", x, self.gain, self.bias, self.eps, call.backend, *self.room)
            call.save(self.mean, mean)
        else:
            u, rstd = run("rms_norm", x, self.gain, self.eps, call.backend, *self.room)
        call.save(self.rstd, rstd)
        return self._narrowed(u, x)

    def recomputed(self, x: Tensor, call: Call) -> Tensor:
        """Returns u from x and the saved statistics."""
        rstd = call.saved[self.rstd.key]
        if self.centred:
            mean = call.saved[self.mean.key]
            own = self.gain, self.bias, call.backend, *self.room
            return run("layer_norm_from_statistics", x, mean, rstd, *own)
        return self._narrowed(run("rms_norm_from_statistics", x, rstd, self.gain, call.backend, *self.room), x)

    def forward_sum(self, y: Tensor, x: Tensor, rate: float, seed: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Returns h = x + drop(y) and norm(h)."""
        own = self.gain, self.bias, self.eps, rate, seed, self.centred
        h, u, mean, rstd = run("dropout_add_norm", y, x, *own, call.backend, *self.room)
        if self.centred:
            call.save(self.mean, mean)
        call.save(self.rstd, rstd)
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
        """Returns the gradient of h, with dh added, and that of y in ``dtype``, which is of size 0 for None.

        du: the gradient of norm(h). dh: what h gets from elsewhere, or None.
        """
        needs = gradients.wants(self.weight), gradients.wants(self.bias)
        mean = call.saved[self.mean.key] if self.centred else None
        own = mean, call.saved[self.rstd.key], self.gain
        dropout = dtype, rate, seed
        dx, dy, *found = run("dropout_add_norm_backward", du, dh, h, *own, *dropout, *needs, call.backend)
        if needs[0] or needs[1]:
            self._add(found, gradients)
        return dx, dy

    def backward(self, du: Tensor, dx: Tensor | None, x: Tensor, call: Call, gradients: Gradients) -> Tensor:
        """Returns the gradient of x from du, with dx, what x gets from elsewhere, added."""
        return self.backward_sum(du, dx, x, None, 0.0, None, call, gradients)[0]

    def parameters_backward(self, du: Tensor, x: Tensor, call: Call, gradients: Gradients) -> None:
        """Adds the gradients of weight and bias alone."""
        needs = gradients.wants(self.weight), gradients.wants(self.bias)
        if not any(needs):
            return
        du, rstd = du.to(torch.promote_types(x.dtype, self.gain.dtype)), call.saved[self.rstd.key]
        if self.centred:
            own = call.saved[self.mean.key], rstd, self.gain, False, *needs
            _, *found = run("layer_norm_backward", du, x, *own, call.backend)
        else:
            _, *found = run("rms_norm_backward", du, x, rstd, self.gain, False, needs[0], call.backend)
        self._add(found, gradients)

    def _add(self, found: list[Tensor], gradients: Gradients) -> None:
        """Adds the gradients of weight and bias; they are of size 0 where they are not wanted."""
        for parameter, gradient in zip(self.bound, found, strict=False):
            gradients.add(parameter, gradient)

    def _narrowed(self, u: Tensor, x: Tensor) -> Tensor:
        if self.offset:
            return u.to(x.dtype)
        narrow = not self.centred and self.weight.dtype.itemsize == 2 and self.weight.dtype != x.dtype
        return u.to(self.weight.dtype) if narrow else u
