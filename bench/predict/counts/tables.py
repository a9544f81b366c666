"""Tables of the Triton wrappers for a card of sm_90, read from their own module.

petl_kernels/backends/triton/config.py imports no Triton, but its package does, and counting needs none: the module is
loaded by its file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import petl_kernels
from bench.predict.counts.work import PROCESSORS

CARD = "sm90"


def _config():
    path = Path(petl_kernels.__file__).parent / "backends" / "triton" / "config.py"
    spec = importlib.util.spec_from_file_location("bench.predict.counts.config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tables = _config()
padded = _tables.padded
ADAPTER_FUSED: int = _tables.ADAPTER_FUSED[CARD]
LOOP_ROWS, VECTOR_ROWS = _tables.QUANTIZED_LOOP_ROWS, _tables.QUANTIZED_VECTOR_ROWS
QUANTIZED = _tables.QUANTIZED[CARD]
# Parts of a sum over rows that programs walk over.
ROW_PARTS = _tables.ROW_PROGRAMS * PROCESSORS
# Parts of a sum over tokens: two programs for each multiprocessor, over the tiles of columns that d = 1024 has.
TOKEN_PARTS = -(-2 * PROCESSORS // (1024 // _tables.TOKEN_SUM[CARD].m))
# Tokens whose gradients one program reads at a time.
GRADIENT_TOKENS = _tables.GRADIENTS[CARD].m
# Queries of a sentence whose gradients one program makes.
SENTENCE = _tables.ATTENTION_SENTENCE[CARD][0].m
FUSED_RANKS = 64  # of backends/triton/lora_linear.py, which needs Triton; test_counts.py holds it

__all__ = [
    "ADAPTER_FUSED",
    "FUSED_RANKS",
    "GRADIENT_TOKENS",
    "LOOP_ROWS",
    "QUANTIZED",
    "ROW_PARTS",
    "SENTENCE",
    "TOKEN_PARTS",
    "VECTOR_ROWS",
    "padded",
]
