"""The ops, as functions. Each is defined once, in a file of its own, and has any number of backends."""

from __future__ import annotations

from petl_kernels.backends import available_backends, backend_of, use
from petl_kernels.ops.activation import activation
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter
from petl_kernels.ops.dropout_add import dropout_add
from petl_kernels.ops.frozen_linear import frozen_linear
from petl_kernels.ops.gated_activation import gated_activation
from petl_kernels.ops.lora_linear import lora_linear, lora_linear_grouped

OPS = ("frozen_linear", "lora_linear", "bottleneck_adapter", "activation", "gated_activation", "dropout_add")

__all__ = [
    "OPS",
    "activation",
    "available_backends",
    "backend_of",
    "bottleneck_adapter",
    "dropout_add",
    "frozen_linear",
    "gated_activation",
    "lora_linear",
    "lora_linear_grouped",
    "use",
]
