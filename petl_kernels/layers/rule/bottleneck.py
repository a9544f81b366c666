"""Bottleneck adapters inside of a layer: y = residual + scale · A(x), with the A of ``ops.bottleneck_adapter``."""

from __future__ import annotations

from torch import Tensor

from petl_kernels.layers.rule.call import Call, Gradients
from petl_kernels.methods.adapter import BottleneckAdapter
from petl_kernels.ops.define import run

# Weight and bias of the norm, D, d, U, u.
Parameters = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]


class Bottleneck:
    """One adapter, bound."""

    def __init__(self, piece: BottleneckAdapter):
        norm = piece.norm
        ln_weight, ln_bias = (None, None) if norm is None else (norm.weight, norm.bias)
        self.eps = 1e-5 if norm is None else norm.eps
        self.activation, self.scale = piece.activation, float(piece.scale)
        down, up = piece.down, piece.up
        self.parameters: Parameters = (ln_weight, ln_bias, down.weight, down.bias, up.weight, up.bias)
        self.bound = [tensor for tensor in self.parameters if tensor is not None]

    def forward(self, x: Tensor, residual: Tensor | None, call: Call) -> Tensor:
        """Returns y; a residual of None stands for x."""
        return run(
            "bottleneck_adapter", x, residual, *self.parameters, self.eps, self.activation, self.scale, call.backend
        )

    def backward(self, dy: Tensor, x: Tensor, residual_is_x: bool, call: Call, gradients: Gradients) -> Tensor:
        """Returns dx, with dy added where x is the residual."""
        *inner, up_bias = self.parameters
        dx, *found = run(
            "bottleneck_adapter_backward",
            dy,
            x,
            residual_is_x,
            *inner,
            self.eps,
            self.activation,
            self.scale,
            True,
            up_bias is not None,
            call.backend,
        )
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradients.wants(parameter):
                gradients.add(parameter, gradient)
        return dx
