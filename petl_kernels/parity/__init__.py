"""Compares the kernels of every op, backend and dtype with the reference: for the router, ``petl-mt doctor`` and tests.

    criterion       how far a kernel's value may be off
    runner          the comparison, case by case, and its table

The cases are in ``petl_kernels/ops/cases``. The makers of their arguments are importable from here as well.
"""

from __future__ import annotations

from petl_kernels.ops.cases.activation import activation_arguments
from petl_kernels.ops.cases.attention import attention_arguments, attention_mask, boundaries
from petl_kernels.ops.cases.bottleneck_adapter import bottleneck_adapter_arguments
from petl_kernels.ops.cases.case import Source, Values, in_float64, normal
from petl_kernels.ops.cases.dropout_add import dropout_add_arguments
from petl_kernels.ops.cases.dropout_add_norm import dropout_add_norm_arguments
from petl_kernels.ops.cases.frozen_ffn import frozen_ffn_arguments
from petl_kernels.ops.cases.frozen_linear import frozen_linear_arguments
from petl_kernels.ops.cases.layer_norm import layer_norm_arguments
from petl_kernels.ops.cases.linear_cross_entropy import linear_cross_entropy_arguments
from petl_kernels.ops.cases.lora_border import lora_border_arguments
from petl_kernels.ops.cases.lora_linear import lora_linear_arguments
from petl_kernels.ops.cases.quantized import quantized_project_arguments, quantized_weight
from petl_kernels.ops.cases.rms_norm import rms_norm_arguments
from petl_kernels.parity.criterion import compare_tensors
from petl_kernels.parity.runner import (
    CASES,
    DTYPES,
    check,
    check_case,
    checked_dtypes,
    compare,
    most_additions,
    run,
    table,
)

__all__ = [
    "CASES",
    "DTYPES",
    "Source",
    "Values",
    "activation_arguments",
    "attention_arguments",
    "attention_mask",
    "bottleneck_adapter_arguments",
    "boundaries",
    "check",
    "check_case",
    "checked_dtypes",
    "compare",
    "compare_tensors",
    "dropout_add_arguments",
    "dropout_add_norm_arguments",
    "frozen_ffn_arguments",
    "frozen_linear_arguments",
    "in_float64",
    "layer_norm_arguments",
    "linear_cross_entropy_arguments",
    "lora_border_arguments",
    "lora_linear_arguments",
    "most_additions",
    "normal",
    "quantized_project_arguments",
    "quantized_weight",
    "rms_norm_arguments",
    "run",
    "table",
]
