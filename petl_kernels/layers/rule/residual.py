"""The sum that ends a block, h = x + drop(y), with the norm that reads it in the same pass, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.layers.rule.call import Call, Gradients
from petl_kernels.layers.rule.norm import Norm
from petl_kernels.ops.define import run


class Residual:
    """The sum of one block. rate: that of the dropout on y."""

    def __init__(self, block: str, rate: float):
        self.rate, self.seed = float(rate), f"{block}.residual"

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """Returns h alone."""
        if self.rate == 0:
            return x + y
        return run("dropout_add", y, x, self.rate, call.seed(self.seed, self.rate), call.backend)

    def add_and_norm(self, y: Tensor, x: Tensor, norm: Norm, call: Call) -> tuple[Tensor, Tensor]:
        """Returns h and norm(h)."""
        return norm.forward_sum(y, x, self.rate, call.seed(self.seed, self.rate), call)

    def backward(self, dh: Tensor, dtype: torch.dtype, call: Call) -> Tensor:
        """Returns the gradient of y in ``dtype``, from that of h alone."""
        if self.rate == 0:
            return dh.to(dtype)
        return run("dropout_add_backward", dh, dtype, self.rate, call.seeds[self.seed], call.backend)

    def norm_backward(
        self,
        du: Tensor,
        dh: Tensor | None,
        h: Tensor,
        norm: Norm,
        dtype: torch.dtype,
        call: Call,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of h and of y, the latter in ``dtype``.

        du: the gradient of norm(h). dh: what h gets from elsewhere, or None.
        """
        dropped = self.rate > 0 or dtype != h.dtype
        seed = call.seeds.get(self.seed)
        dh, dy = norm.backward_sum(du, dh, h, dtype if dropped else None, self.rate, seed, call, gradients)
        return dh, dy if dropped else dh
