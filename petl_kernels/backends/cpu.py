"""The C++ kernels for the CPU (``csrc/cpu``)."""

from __future__ import annotations

import platform

import torch

from petl_kernels.dispatch import register

# The extension is compiled for AVX2 on x86-64; loading it on an older processor would end the process.
if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    raise ImportError("this processor has no AVX2")
try:
    import petl_kernels._C  # noqa: F401  registers torch.ops.petl_cpu
except ModuleNotFoundError as error:
    raise ImportError("the C++ extension was not built: reinstall with a C++ compiler on the PATH") from error

_WITH_BACKWARD = (
    "frozen_linear",
    "lora_linear",
    "bottleneck_adapter",
    "layer_norm",
    "rms_norm",
    "frozen_ffn",
    "attention",
    "activation",
    "gated_activation",
    "dropout_add",
    "dropout_add_norm",
)
_ALONE = (
    "layer_norm_from_statistics",
    "rms_norm_from_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_begin",
    "linear_cross_entropy_words",
    "linear_cross_entropy_end",
    "product",
    "quantize_int8",
    "quantize_nf4",
    "dequantize",
    "quantized_project",
    "quantized_project_back",
    "quantized_embedding",
)
for _name in (*_WITH_BACKWARD, *(f"{_op}_backward" for _op in _WITH_BACKWARD), *_ALONE):
    register(_name, "cpu")(getattr(torch.ops.petl_cpu, _name).default)
