"""A drop-in for ``torch.nn.Linear`` whose weight is frozen."""

from __future__ import annotations

from torch import Tensor, nn

from petl_kernels import ops


class FrozenLinear(nn.Linear):
    """``nn.Linear`` through ``ops.frozen_linear``: it saves nothing for backward.

    The weight (out_features, in_features) is frozen, the bias may be trained. Parameter names are those of
    ``nn.Linear``, so state dicts fit either way.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FrozenLinear:
        """Returns a layer with the parameters of ``linear``, whose weight it freezes."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight.requires_grad_(False)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.frozen_linear(x, self.weight, self.bias)
