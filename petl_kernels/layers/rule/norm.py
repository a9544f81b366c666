"""LayerNorm and RMSNorm of a block: kept are the statistics, the output is made again from them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.ops.common import run


class Norm:
    """u = norm(x), for x (..., d). An RMSNorm of 16 bits returns 16 bits, also for a wider x."""

    def __init__(self, block: str, norm: nn.Module):
        self.mean, self.rstd = Place(block, "mean"), Place(block, "rstd")
        self.weight, self.centred = norm.weight, isinstance(norm, nn.LayerNorm)
        self.bias = norm.bias if self.centred else None
        self.eps = norm.eps if self.centred else norm.variance_epsilon
        self.bound = [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def named(self, block: str) -> Norm:
        """Returns the same norm for another place, whose statistics are kept under the name ``block``."""
        other = copy.copy(self)
        other.mean, other.rstd = Place(block, "mean"), Place(block, "rstd")
        return other

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.centred:
            u, mean, rstd = run("layer_norm", x, self.weight, self.bias, self.eps, call.backend)
            call.keep(self.mean, mean)
        else:
            u, rstd = run("rms_norm", x, self.weight, self.eps, call.backend)
        call.keep(self.rstd, rstd)
        return self._narrowed(u, x)

    def again(self, x: Tensor, call: Call) -> Tensor:
        rstd = call.kept[self.rstd.key]
        if self.centred:
            mean = call.kept[self.mean.key]
            return run("layer_norm_from_statistics", x, mean, rstd, self.weight, self.bias, call.backend)
        return self._narrowed(run("rms_norm_from_statistics", x, rstd, self.weight, call.backend), x)

    def backward(self, du: Tensor, x: Tensor, call: Call, gradients: Gradients, need_dx: bool) -> Tensor | None:
        """Returns dx where it is needed."""
        need_weight, need_bias = gradients.wants(self.weight), gradients.wants(self.bias)
        if not (need_dx or need_weight or need_bias):
            return None
        rstd = call.kept[self.rstd.key]
        du = du.to(torch.promote_types(x.dtype, self.weight.dtype))
        if self.centred:
            mean = call.kept[self.mean.key]
            needs = need_dx, need_weight, need_bias
            dx, dweight, dbias = run("layer_norm_backward", du, x, mean, rstd, self.weight, *needs, call.backend)
            if need_bias:
                gradients.add(self.bias, dbias)
        else:
            dx, dweight = run("rms_norm_backward", du, x, rstd, self.weight, need_dx, need_weight, call.backend)
        if need_weight:
            gradients.add(self.weight, dweight)
        return dx if need_dx else None

    def _narrowed(self, u: Tensor, x: Tensor) -> Tensor:
        narrow = not self.centred and self.weight.dtype.itemsize == 2 and self.weight.dtype != x.dtype
        return u.to(self.weight.dtype) if narrow else u
