"""What one call of an op allocates inside itself, beside its inputs and outputs, on the CPU's C++ kernels.

Only ops whose scratch grows with the batch or is a matter of megabytes; the others stay below the planner's slack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels.ops.common import accumulate_dtype
from petl_kernels.ops.frozen_ffn import chunk_rows
from petl_kernels.ops.linear_cross_entropy import SCALED_BYTES


def scratch_bytes(function, args: tuple) -> int:
    """Bytes for ``function`` (a ``torch.ops.petl`` overload) called with ``args``; 0 for any other."""
    name = function.name()
    if not name.startswith("petl::"):
        return 0
    rule = _RULES.get(name.removeprefix("petl::"))
    if rule is None:
        return 0
    given = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)}
    return rule(given)


def _linear_cross_entropy(given: dict) -> int:
    hidden, d, chunk_bytes = given["hidden"], given["hidden"].shape[-1], given["chunk_bytes"]
    rows, words = hidden.numel() // d, _rows_of(given["weight"], d)
    size = min(rows, max(1, chunk_bytes // (words * hidden.itemsize)))
    size = -(-rows // -(-rows // max(1, size)))
    # the logits of a chunk and the gradient of its rows
    total = size * (words + d) * hidden.itemsize
    if _dtype_of(given["weight"]) != hidden.dtype:  # blocks of words in the dtype of hidden, sums over them in a wider one
        total += min(words * d * hidden.itemsize, chunk_bytes // 4) + size * d * accumulate_dtype(hidden.dtype).itemsize
    return total


def _scaled(given: dict) -> int:
    return 2 * min(SCALED_BYTES, given["values"].numel() * given["factor"].itemsize)


def _frozen_ffn(given: dict) -> int:
    return _ffn_chunks(given, given["x"], 1 if given["gate"] is None or given["keeps"] == "z" else 2)


def _frozen_ffn_backward(given: dict) -> int:
    gated = given["gate"] is not None
    chunks = (2 if gated else 1) * (2 if given["keeps"] == "x" else 1)
    return _ffn_chunks(given, given["dy"], chunks)


def _ffn_chunks(given: dict, x: Tensor, chunks: int) -> int:
    d = x.shape[-1]
    hidden = _rows_of(given["w1"], d)
    return chunks * chunk_rows(x.numel() // d, hidden, x.itemsize) * hidden * x.itemsize


def _attention(given: dict, buffers: int = 1) -> int:
    """A thread's keys and values of one head, and its block of scores: see csrc/cpu/attention.cpp."""
    q, k, prefix = given["q"], given["k"], given["prefix_k"]
    columns = k.shape[2] + (0 if prefix is None else prefix.shape[0])
    block = min(max(16, min(256, (1 << 17) // max(1, columns))), max(1, q.shape[2]))
    scores = block * columns * (2 if given["dropout"] else 1)
    own = 2 * columns * q.shape[3] + 2 * block * q.shape[3] + scores
    return torch.get_num_threads() * buffers * own * accumulate_dtype(q.dtype).itemsize


def _bottleneck_adapter(given: dict) -> int:
    x, down = given["x"], given["down"]
    rows = x.numel() // x.shape[-1]
    blocks = min(rows, 256) * (3 * x.shape[-1] + 3 * down.shape[0])
    return (torch.get_num_threads() * blocks + 2 * down.numel()) * 4


def _bottleneck_adapter_backward(given: dict) -> int:
    x, down = given["x"], given["down"]
    slices = max(1, min(16, x.numel() // x.shape[-1] // 256))
    return _bottleneck_adapter(given) + 2 * slices * down.numel() * 4


def _rows_of(weight: Tensor | list[Tensor], columns: int) -> int:
    """N of a weight (N, columns), dense or in its quantised parts."""
    data = weight if isinstance(weight, Tensor) else weight[0]
    return data.shape[0] if data.dim() == 2 else 2 * data.shape[0] // columns


def _dtype_of(weight: Tensor | list[Tensor]) -> torch.dtype:
    return (weight if isinstance(weight, Tensor) else weight[0]).dtype


_RULES: dict[str, Callable[[dict], int]] = {
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_scaled": _scaled,
    "frozen_ffn": _frozen_ffn,
    "frozen_ffn_backward": _frozen_ffn_backward,
    "attention": _attention,
    "attention_backward": lambda given: _attention(given, 2),
    "bottleneck_adapter": _bottleneck_adapter,
    "bottleneck_adapter_backward": _bottleneck_adapter_backward,
}
