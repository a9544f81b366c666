"""Triton kernels of the ops: for CUDA devices, and for the CPU in Triton's interpreter (TRITON_INTERPRET=1).

The kernels take bf16, fp16 and fp32; a call in another dtype goes to the reference. So does bf16 in the
interpreter, whose bf16 products are wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton

from petl_kernels import versions
from petl_kernels.dispatch import PARTS, kernel_of, register

versions.check("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and isinstance(triton.language.cdiv, triton.JITFunction):
    raise ImportError("triton was imported before TRITON_INTERPRET=1 was set")

from petl_kernels.backends.triton import (  # noqa: E402
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
    lora_border,
    lora_linear,
    loss_by_words,
    quantize,
    quantized,
    rms_norm,
)

DTYPES = {torch.float16, torch.float32} | (set() if INTERPRETED else {torch.bfloat16})


def _register(kernel: Callable) -> None:
    op = kernel.__name__

    @register(op, "triton")
    def serve(first, *args):
        x = first[0] if isinstance(first, (list, tuple)) else first
        return (kernel if x.dtype in DTYPES else kernel_of(op, "reference"))(first, *args)


for module in (
    frozen_linear,
    lora_linear,
    lora_border,
    bottleneck_adapter,
    layer_norm,
    rms_norm,
    frozen_ffn,
    attention,
    activation,
    gated_activation,
    dropout_add,
    dropout_add_norm,
    linear_cross_entropy,
):
    name = module.__name__.rpartition(".")[2]
    for part in ("", *PARTS):
        if hasattr(module, name + part):
            _register(getattr(module, name + part))

# Their names are not the files'.
for kernel in (
    loss_by_words.linear_cross_entropy_begin,
    loss_by_words.linear_cross_entropy_words,
    loss_by_words.linear_cross_entropy_end,
    quantize.quantize_int8,
    quantize.quantize_nf4,
    quantized.quantized_project,
    quantized.quantized_project_back,
):
    _register(kernel)


@register("dequantize", "triton")
def _dequantize(parts, first_row, rows, columns, dtype):
    kernel = quantized.dequantize if dtype in DTYPES else kernel_of("dequantize", "reference")
    return kernel(parts, first_row, rows, columns, dtype)
