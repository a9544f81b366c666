"""The modules alone, for a model of one's own."""

from __future__ import annotations

from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.layers.linear_cross_entropy import LinearCrossEntropy
from petl_kernels.methods.adapter import BottleneckAdapter
from petl_kernels.methods.lora import GroupedLoRALinear, LoRALinear

__all__ = ["BottleneckAdapter", "FrozenLinear", "GroupedLoRALinear", "LinearCrossEntropy", "LoRALinear"]
