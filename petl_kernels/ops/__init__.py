"""The ops, as functions. Each is defined once, in a file of its own, and has any number of backends."""

from __future__ import annotations

# The first has no function: a layer's rule runs it.
import petl_kernels.ops.lora_border  # noqa: F401  # pyright: ignore[reportUnusedImport]
from petl_kernels.dispatch import available_backends, backend_of, use
from petl_kernels.ops.activation import activation
from petl_kernels.ops.attention import attention
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter
from petl_kernels.ops.capped_attention import capped_attention
from petl_kernels.ops.dropout_add import dropout_add
from petl_kernels.ops.dropout_add_norm import dropout_add_norm
from petl_kernels.ops.frozen_ffn import frozen_ffn
from petl_kernels.ops.frozen_linear import frozen_linear
from petl_kernels.ops.gated_activation import gated_activation
from petl_kernels.ops.layer_norm import layer_norm, layer_norm_from_statistics, layer_norm_with_statistics
from petl_kernels.ops.linear_cross_entropy import linear_cross_entropy
from petl_kernels.ops.lora_linear import lora_linear, lora_linear_grouped
from petl_kernels.ops.lora_norm import lora_norm
from petl_kernels.ops.parallel_ffn import parallel_ffn
from petl_kernels.ops.quantized import QuantizedTensor, quantize, quantized_embedding
from petl_kernels.ops.rms_norm import rms_norm, rms_norm_from_statistics, rms_norm_with_statistics

# The spelling of earlier versions.
QuantisedTensor, quantise, quantised_embedding = QuantizedTensor, quantize, quantized_embedding

OPS = (
    "frozen_linear",
    "lora_linear",
    "lora_border",
    "bottleneck_adapter",
    "layer_norm",
    "rms_norm",
    "frozen_ffn",
    "attention",
    "capped_attention",
    "activation",
    "gated_activation",
    "dropout_add",
    "dropout_add_norm",
    "linear_cross_entropy",
    "quantize_int8",
    "quantize_nf4",
    "dequantize",
    "quantized_project",
    "quantized_embedding",
)

__all__ = [
    "OPS",
    "QuantizedTensor",
    "activation",
    "attention",
    "available_backends",
    "backend_of",
    "bottleneck_adapter",
    "capped_attention",
    "dropout_add",
    "dropout_add_norm",
    "frozen_ffn",
    "frozen_linear",
    "gated_activation",
    "layer_norm",
    "layer_norm_from_statistics",
    "layer_norm_with_statistics",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "lora_norm",
    "parallel_ffn",
    "quantize",
    "quantized_embedding",
    "rms_norm",
    "rms_norm_from_statistics",
    "rms_norm_with_statistics",
    "use",
]
