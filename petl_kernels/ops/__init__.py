"""The ops, as functions. Each is defined once, in a file of its own, and has any number of backends."""

from __future__ import annotations

from petl_kernels.backends import available_backends, backend_of, use
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter
from petl_kernels.ops.frozen_linear import frozen_linear
from petl_kernels.ops.linear_cross_entropy import linear_cross_entropy
from petl_kernels.ops.lora_linear import lora_linear, lora_linear_grouped

OPS = ("frozen_linear", "lora_linear", "bottleneck_adapter", "linear_cross_entropy")

__all__ = [
    "OPS",
    "available_backends",
    "backend_of",
    "bottleneck_adapter",
    "frozen_linear",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "use",
]
