"""The reference as a backend: importing the ops registers it, beside each formula in ``petl_kernels/ops``."""

from __future__ import annotations

from petl_kernels.ops import bottleneck_adapter, frozen_linear, linear_cross_entropy, lora_linear  # noqa: F401
