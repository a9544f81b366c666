"""Rows of a quantized table, y = Ŵ[ids]: only the rows that are looked up are dequantized.

ids (...) int64 or int32, Ŵ (N, K) in int8 or NF4, y (..., K) in the dtype that the table stands for.

Saves: nothing beside the table's own tensors, which live anyway.
Source: ``F.embedding`` of the dequantized table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.define import define
from petl_kernels.ops.quantized.storage import nf4_values, out_features, storage_of, tiles
from petl_kernels.ops.quantized.tensor import QuantizedTensor, takes_quantized


def quantized_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Returns the rows ``ids`` (...) of ``weight`` (N, K): (..., K) in the weight's dtype.

    Raises InputError: ids that are no integers, another device, a weight that is not quantized. IndexError on the CPU
    for an id that is no row.
    """
    if not isinstance(weight, QuantizedTensor):
        raise InputError("quantized_embedding: weight is dense: expected a quantized one (or use F.embedding)")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"quantized_embedding: ids has dtype {ids.dtype}: expected torch.int64 or torch.int32")
    if ids.device != weight.device:
        raise InputError(f"quantized_embedding: ids is on {ids.device}: expected the device of weight, {weight.device}")
    return torch.ops.petl.quantized_embedding(ids, weight.parts(), weight.shape[1], weight.dtype, active())


@takes_quantized(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise InputError(f"embedding: max_norm is {max_norm}: expected None for a quantized weight, which is frozen")
    return quantized_embedding(input, weight)


@register("quantized_embedding", "reference")
def reference_embedding(ids: Tensor, parts: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    ids = ids.reshape(-1).long()
    if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < out_features(parts, columns):
        raise IndexError("index out of range in self")  # the words of F.embedding
    y = torch.empty(ids.shape[0], columns, dtype=dtype, device=ids.device)
    for part in tiles(ids.shape[0], columns, torch.int64):
        if storage_of(parts) == "int8":
            data, scale = parts
            y[part] = data[ids[part]].float() * scale[ids[part], None]
        else:
            y[part] = nf4_values(parts, ids[part, None] * columns + torch.arange(columns, device=ids.device))
    return y


def _forward(ids: Tensor, weight: list[Tensor], columns: int, dtype: torch.dtype, backend: str) -> Tensor:
    y = dispatch("quantized_embedding", ids.device, backend, dtype)(ids, weight, columns, dtype)
    return y.view(*ids.shape, columns)


def _forward_fake(ids: Tensor, weight: list[Tensor], columns: int, dtype: torch.dtype, backend: str) -> Tensor:
    return weight[0].new_empty(*ids.shape, columns, dtype=dtype)


define(
    "quantized_embedding",
    "(Tensor ids, Tensor[] weight, int columns, ScalarType dtype, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
