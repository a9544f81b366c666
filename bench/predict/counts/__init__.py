"""Counts of each op: operations and bytes that nobody can avoid, and the launches that ours makes of them.

Operations are those of matrix products, two a multiplication. Bytes are the op's own inputs and outputs, read or
written once, forward and backward: what backward saves is an output of forward and an input of backward. The launches
are those of the Triton wrappers at their tiles for sm_80 and newer; each has its operations, its device memory, and,
where they bound it, the instructions a thread spends on each element (counted in the compiled code, bench/NOTES.md).
A launch of the library (cuBLAS, PyTorch) is marked. tests/bench/test_counts.py holds all of this to the code.

t tokens, k inputs and n outputs of a linear, d the width of the model, m a bottleneck, f the width of a feed-forward
block's inside; `size` is the bytes of an element of the activations. Adapters are kept in fp32.
"""

from __future__ import annotations

from bench.predict.counts.blocks import bottleneck_adapter, frozen_ffn, linear_cross_entropy, parallel_ffn
from bench.predict.counts.elementwise import (
    activation,
    attention,
    dropout_add,
    dropout_add_norm,
    gated_activation,
    layer_norm,
    rms_norm,
)
from bench.predict.counts.linears import frozen_linear, lora_border, lora_linear
from bench.predict.counts.quantized import dequantize, quantize, quantized_project
from bench.predict.counts.whole import layer, step
from bench.predict.counts.work import Counts, Launch, streams, total

__all__ = [
    "Counts",
    "Launch",
    "activation",
    "attention",
    "bottleneck_adapter",
    "dequantize",
    "dropout_add",
    "dropout_add_norm",
    "frozen_ffn",
    "frozen_linear",
    "gated_activation",
    "layer",
    "layer_norm",
    "linear_cross_entropy",
    "lora_border",
    "lora_linear",
    "parallel_ffn",
    "quantize",
    "quantized_project",
    "rms_norm",
    "step",
    "streams",
    "total",
]
