"""The vocabulary loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from petl_kernels import ops


class LinearCrossEntropy(nn.Module):
    """``ops.linear_cross_entropy`` with its options fixed. It owns no parameter: the weight is the model's."""

    def __init__(
        self,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_scale: float = 1.0,
        smoothing: str = "uniform",
        chunk_bytes: int | None = None,
    ):
        super().__init__()
        self.options = {
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "logit_scale": logit_scale,
            "smoothing": smoothing,
            "chunk_bytes": chunk_bytes,
        }

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
