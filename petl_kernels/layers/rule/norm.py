"""LayerNorm and RMSNorm of a block. Their statistics are saved, and the output is recomputed from these.

An RMSNorm of ``OFFSET_NORMS`` multiplies by 1 + weight; that sum is made anew for each pass.

SSF's γ and β behind a LayerNorm are inside its weight and bias, γ ⊙ w and γ ⊙ b + β, which are made anew for each use:
the ops then take one pass, and the gradients of w and b that they return give those of γ and β. An RMSNorm has no
bias: β is added to its output.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.pieces import active_piece
from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.methods.ssf import ScaleShift
from petl_kernels.models.transformers_names import OFFSET_NORMS
from petl_kernels.ops.define import accumulate_dtype, run


class Norm:
    """u = norm(x), for x (..., d).

    An RMSNorm of 16 bits returns 16 bits, also for a wider x; one with an offset returns the dtype of x.
    scale, shift: SSF's γ and β, or None. piece: what another adapter has put on the norm.
    """

    def __init__(self, block: str, norm: Any):
        self.mean, self.rstd = Place(block, "mean"), Place(block, "rstd")
        self.centred = isinstance(norm, nn.LayerNorm)
        self.weight: Tensor = norm.weight
        self.bias: Tensor | None = norm.bias if self.centred else None
        self.offset = type(norm).__name__ in OFFSET_NORMS
        self.eps: float = norm.eps if self.centred or self.offset else norm.variance_epsilon
        piece = active_piece(norm)
        by_ssf = isinstance(piece, ScaleShift)
        self.scale, self.shift = (piece.scale, piece.shift) if by_ssf else (None, None)
        self.piece = None if by_ssf else piece
        own = self.weight, self.bias, self.scale, self.shift
        self.bound = [tensor for tensor in own if tensor is not None]
        self.room: tuple[int, ...] = ()  # one number: free columns behind each row of the output

    def named(self, block: str) -> Norm:
        """Returns the same norm at another place, whose statistics are saved under the name ``block``."""
        other = copy.copy(self)
        other.mean, other.rstd = Place(block, "mean"), Place(block, "rstd")
        return other

    @property
    def gain(self) -> Tensor:
        """The factor of the normalised x, without SSF's."""
        return 1 + self.weight.to(accumulate_dtype(self.weight.dtype)) if self.offset else self.weight

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Returns the gain and the bias, with SSF's γ and β inside."""
        gain = self.gain
        if self.scale is None:
            return gain, self.bias
        weight = (gain * self.scale).to(gain.dtype)
        if self.bias is None:
            return weight, None
        bias = self.bias * self.scale
        return weight, (bias if self.shift is None else bias + self.shift).to(self.bias.dtype)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """Returns u, and saves the statistics."""
        weight, bias = self.affine()
        if self.centred:
            u, mean, rstd = run("layer_norm", x, weight, bias, self.eps, call.backend, *self.room)
            call.save(self.mean, mean)
        else:
            u, rstd = run("rms_norm", x, weight, self.eps, call.backend, *self.room)
        call.save(self.rstd, rstd)
        return self._finished(u, x)

    def recomputed(self, x: Tensor, call: Call) -> Tensor:
        """Returns u from x and the saved statistics."""
        rstd, (weight, bias) = call.saved[self.rstd.key], self.affine()
        if self.centred:
            mean = call.saved[self.mean.key]
            return run("layer_norm_from_statistics", x, mean, rstd, weight, bias, call.backend, *self.room)
        return self._finished(run("rms_norm_from_statistics", x, rstd, weight, call.backend, *self.room), x)

    def forward_sum(self, y: Tensor, x: Tensor, rate: float, seed: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Returns h = x + drop(y) and norm(h)."""
        own = *self.affine(), self.eps, rate, seed, self.centred
        h, u, mean, rstd = run("dropout_add_norm", y, x, *own, call.backend, *self.room)
        if self.centred:
            call.save(self.mean, mean)
        call.save(self.rstd, rstd)
        return h, self._finished(u, h)

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
        needs = self._needs(gradients)
        mean = call.saved[self.mean.key] if self.centred else None
        own = mean, call.saved[self.rstd.key], self.affine()[0]
        dropout = dtype, rate, seed
        dx, dy, *found = run("dropout_add_norm_backward", du, dh, h, *own, *dropout, *needs, call.backend)
        self._add(found, du, gradients)
        return dx, dy

    def backward(self, du: Tensor, dx: Tensor | None, x: Tensor, call: Call, gradients: Gradients) -> Tensor:
        """Returns the gradient of x from du, with dx, what x gets from elsewhere, added."""
        return self.backward_sum(du, dx, x, None, 0.0, None, call, gradients)[0]

    def parameters_backward(self, du: Tensor, x: Tensor, call: Call, gradients: Gradients) -> None:
        """Adds the gradients of weight and bias alone, or of γ and β."""
        needs = self._needs(gradients)
        if not any(needs):
            return
        weight, _ = self.affine()
        du, rstd = du.to(torch.promote_types(x.dtype, weight.dtype)), call.saved[self.rstd.key]
        if self.centred:
            own = call.saved[self.mean.key], rstd, weight, False, *needs
            _, *found = run("layer_norm_backward", du, x, *own, call.backend)
        else:
            _, *found = run("rms_norm_backward", du, x, rstd, weight, False, needs[0], call.backend)
        self._add(found, du, gradients)

    def _needs(self, gradients: Gradients) -> tuple[bool, bool]:
        """Returns whether the gradients of the weight and of the bias are needed."""
        by_ssf = gradients.wants(self.scale)
        has_bias = self.bias is not None
        return (
            gradients.wants(self.weight) or by_ssf,
            gradients.wants(self.bias) or (has_bias and (by_ssf or gradients.wants(self.shift))),
        )

    def _add(self, found: list[Tensor], du: Tensor, gradients: Gradients) -> None:
        """Adds the gradients of weight and bias, and of γ and β from them. Those that are not needed are of size 0."""
        dweight, dbias = found[0], found[1] if self.bias is not None else None
        if self.scale is None:
            gradients.add(self.weight, dweight)
            if dbias is not None:
                gradients.add(self.bias, dbias)
            return
        if gradients.wants(self.weight):
            gradients.add(self.weight, dweight * self.scale)
        if dbias is not None and gradients.wants(self.bias):
            gradients.add(self.bias, dbias * self.scale)
        if gradients.wants(self.scale):
            dscale = dweight * self.gain
            gradients.add(self.scale, dscale if dbias is None or self.bias is None else dscale + dbias * self.bias)
        if gradients.wants(self.shift):
            rows = du.reshape(-1, du.shape[-1])
            gradients.add(self.shift, rows.sum(0, dtype=accumulate_dtype(du.dtype)) if dbias is None else dbias)

    def _finished(self, u: Tensor, x: Tensor) -> Tensor:
        """Returns u in its dtype, and with β where the bias does not hold it."""
        if self.offset:
            u = u.to(x.dtype)
        elif not self.centred and self.weight.dtype.itemsize == 2:
            u = u.to(self.weight.dtype)
        return u if self.shift is None or self.bias is not None else u.add_(self.shift.to(u.dtype))
