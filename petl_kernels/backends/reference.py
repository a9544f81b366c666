"""The reference as a backend: importing the ops registers it, beside each formula in ``petl_kernels/ops``."""

from __future__ import annotations

from petl_kernels.ops import (  # noqa: F401
    activation,
    attention,
    bottleneck_adapter,
    dropout_add,
    dropout_add_norm,
    frozen_ffn,
    frozen_linear,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    quantised,
    rms_norm,
)
