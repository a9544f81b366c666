"""Frozen weights in 8 or 4 bits, and what is computed with them.

code_book       the numbers that the bits stand for
storage         the layout of int8 and NF4, and the reference that makes and reads them
products        y = x Ŵᵀ + c and dx = dy Ŵ, for a weight in any storage
tensor          QuantizedTensor, in the place of a dense weight, and quantize
embedding       y = Ŵ[ids]
"""

from __future__ import annotations

from petl_kernels.ops.quantized.code_book import BLOCK, NF4_CODE, NF4_THRESHOLDS, SUPERBLOCK, dynamic_map
from petl_kernels.ops.quantized.embedding import quantized_embedding, reference_embedding
from petl_kernels.ops.quantized.products import (
    dequantize,
    project,
    project_back,
    reference_project,
    reference_project_back,
)
from petl_kernels.ops.quantized.storage import (
    CUDA_TILE_BYTES,
    PARTS,
    STORAGES,
    TILE_BYTES,
    in_features,
    is_quantized,
    out_features,
    part_rows,
    part_shapes,
    parts_in,
    reference_dequantize,
    reference_quantize_int8,
    reference_quantize_nf4,
    row_blocks,
    split_parts,
    storage_bytes,
    storage_of,
    tiles,
)

# Saved weights of earlier versions have ``_rebuild`` by its name here.
from petl_kernels.ops.quantized.tensor import (
    QuantizedTensor,
    _rebuild,  # noqa: F401  # pyright: ignore[reportPrivateUsage, reportUnusedImport]
    parts_of,
    quantize,
    quantize_like,
)

__all__ = [
    "BLOCK",
    "CUDA_TILE_BYTES",
    "NF4_CODE",
    "NF4_THRESHOLDS",
    "PARTS",
    "STORAGES",
    "SUPERBLOCK",
    "TILE_BYTES",
    "QuantizedTensor",
    "dequantize",
    "dynamic_map",
    "in_features",
    "is_quantized",
    "out_features",
    "part_rows",
    "part_shapes",
    "parts_in",
    "parts_of",
    "project",
    "project_back",
    "quantize",
    "quantize_like",
    "quantized_embedding",
    "reference_dequantize",
    "reference_embedding",
    "reference_project",
    "reference_project_back",
    "reference_quantize_int8",
    "reference_quantize_nf4",
    "row_blocks",
    "split_parts",
    "storage_bytes",
    "storage_of",
    "tiles",
]
