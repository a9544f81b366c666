"""The norms of a linear layer's rows with a low-rank change inside, which DoRA divides by.

    n_i   = ‖W_i + scale · B_i A‖

W (N, K), A (r, K), B (N, r), n (N,). W is dense (bf16, fp16, fp32, fp64) or quantized (``ops/quantized``); n is in
fp32, or in fp64 where one of the three is. W + scale · B A is made in tiles of rows, never as a whole; the sum of its
squares in three terms would take as many operations, and they could cancel each other. n is a constant in backward:
there is no gradient.

Saves: nothing.
Source: DoRA, arXiv 2402.09353, section 4.3 (the norm is detached).
"""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch
from petl_kernels.ops.checks import check_parameter
from petl_kernels.ops.define import define
from petl_kernels.ops.quantized.storage import CUDA_TILE_BYTES, TILE_BYTES, is_quantized, tiles
from petl_kernels.ops.quantized.tensor import parts_of


def lora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns ‖W + scale · B A‖ of each row, (N,), without a gradient; W (N, K), A (r, K), B (N, r).

    Raises InputError for shapes that do not fit, and for devices that differ.
    """
    rank = b.shape[-1]
    check_parameter("lora_norm", "b", b, (weight.shape[0], rank), weight)
    check_parameter("lora_norm", "a", a, (rank, weight.shape[1]), weight)
    return torch.ops.petl.lora_norm(parts_of(weight), a.detach(), b.detach(), float(scale), active())


def norm_dtype(weight: list[Tensor], a: Tensor, b: Tensor) -> torch.dtype:
    """Returns the dtype of the norms: fp32, or fp64 where W, A or B is in fp64."""
    dtypes = [own.dtype for own in (a, b, *([] if is_quantized(weight) else weight))]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def tile_bytes(device: str) -> int:
    """Returns the most bytes of a tile on a kind of device."""
    return CUDA_TILE_BYTES if device == "cuda" else TILE_BYTES


def _forward(weight: list[Tensor], a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    wide = norm_dtype(weight, a, b)
    rows, columns = b.shape[0], a.shape[1]
    a, b = a.to(wide), b.to(wide)
    norms = b.new_empty(rows)
    for part in tiles(rows, columns, wide, tile_bytes(a.device.type)):
        changed = torch.addmm(_tile(weight, part, columns, wide, backend), b[part], a, alpha=scale)
        norms[part] = torch.linalg.vector_norm(changed, dim=1)  # pyright: ignore[reportUnknownMemberType]
    return norms


def _tile(weight: list[Tensor], part: slice, columns: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Returns rows of W in ``dtype``."""
    if not is_quantized(weight):
        return weight[0][part].to(dtype)
    kernel = dispatch("dequantize", weight[0].device, backend, dtype)
    return kernel(weight, part.start, part.stop - part.start, columns, dtype)


def _forward_fake(weight: list[Tensor], a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    return b.new_empty(b.shape[0], dtype=norm_dtype(weight, a, b))


define(
    "lora_norm", "(Tensor[] weight, Tensor a, Tensor b, float scale, str backend) -> Tensor", _forward, _forward_fake
)
