"""Products with a frozen weight in any storage.

    project         y  = x Ŵᵀ + c           x (tokens, K), c (N,) or None
    project_back    dx = dy Ŵ               dy (tokens, N); sums over blocks of N are fp32

Ŵ (N, K) is fp32, rounded to the dtype of the product it enters, which is that of the other factor (bf16, fp16, fp32,
fp64). It exists in tiles of at most 1 MiB, or 32 MiB on CUDA. A frozen weight has no gradient.

Saves: nothing beside the weight's own tensors, which live anyway.
Source: the product of the dequantized weight, tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.ops.define import accumulate_dtype
from petl_kernels.ops.quantized.storage import (
    in_features,
    is_quantized,
    out_features,
    reference_dequantize,
    tiles,
)


def project(rows: Tensor, parts: list[Tensor], bias: Tensor | None = None, backend: str = "") -> Tensor:
    """Returns rows (tokens, K) Wᵀ + bias (N,), for W in any storage; a dense W and the bias have the dtype of rows."""
    if not is_quantized(parts):
        return F.linear(rows, parts[0], bias)
    return dispatch("quantized_project", rows.device, backend, rows.dtype)(rows.contiguous(), parts, bias)


def project_back(rows: Tensor, parts: list[Tensor], backend: str = "") -> Tensor:
    """Returns rows (tokens, N) W, for W in any storage; a dense W has the dtype of rows."""
    if not is_quantized(parts):
        return rows @ parts[0]
    return dispatch("quantized_project_back", rows.device, backend, rows.dtype)(rows.contiguous(), parts)


def dequantize(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns the rows from ``first_row`` on, (rows, columns), of a quantized weight with ``columns`` columns."""
    return dispatch("dequantize", parts[0].device, active(), dtype)(parts, first_row, rows, columns, dtype)


@register("quantized_project", "reference")
def reference_project(rows: Tensor, parts: list[Tensor], bias: Tensor | None) -> Tensor:
    columns = rows.shape[1]
    words = out_features(parts, columns)
    y = rows.new_empty(rows.shape[0], words)
    for part in tiles(words, columns, rows.dtype):
        tile = reference_dequantize(parts, part.start, part.stop - part.start, columns, rows.dtype)
        if bias is None:
            torch.mm(rows, tile.T, out=y[:, part])
        else:
            torch.addmm(bias[part], rows, tile.T, out=y[:, part])
    return y


@register("quantized_project_back", "reference", op="quantized_project")
def reference_project_back(rows: Tensor, parts: list[Tensor]) -> Tensor:
    words = rows.shape[1]
    columns = in_features(parts, words)
    total = rows.new_zeros(rows.shape[0], columns, dtype=accumulate_dtype(rows.dtype))
    for part in tiles(words, columns, rows.dtype):
        total += rows[:, part] @ reference_dequantize(parts, part.start, part.stop - part.start, columns, rows.dtype)
    return total.to(rows.dtype)
