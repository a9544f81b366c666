"""Rows that leave room behind them: (..., d) as the first columns of a matrix (tokens, d + room) of its own.

A product over d + room columns then needs no copy of what a norm has written, nor of the gradients of an attention
(``ops/lora_border.py``). A norm that is asked for ``room`` returns its output so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from petl_kernels.dispatch import kernel_of


def roomy(like: Tensor, shape: Sequence[int], room: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty tensor of ``shape`` (..., d), whose rows are d + room apart."""
    *leading, d = shape
    return like.new_empty((*leading, d + room), dtype=dtype or like.dtype)[..., :d]


def whole_rows(parts: Sequence[Tensor], room: int) -> Tensor | None:
    """Returns (tokens, d + room), the rows of ``parts``, each (..., d_i) with d = Σ d_i, and what is behind them.

    None where they do not stand side by side in such a matrix, which is all of its memory.
    """
    leading, width = parts[0].shape[:-1], sum(part.shape[-1] for part in parts) + room
    tokens = math.prod(leading)
    if parts[0].untyped_storage().nbytes() != tokens * width * parts[0].itemsize:
        return None
    strides = [*(math.prod(leading[i + 1 :]) * width for i in range(len(leading))), 1]
    offset, storage = 0, parts[0].untyped_storage()._cdata
    for part in parts:
        same = all(size < 2 or a == b for size, a, b in zip(part.shape, part.stride(), strides, strict=True))
        if not same or part.storage_offset() != offset or part.untyped_storage()._cdata != storage:
            return None
        offset += part.shape[-1]
    return parts[0].as_strided((tokens, width), (width, 1))


def copied_rows(parts: Sequence[Tensor], room: int) -> Tensor:
    """The same in a new matrix; what is behind the rows is not set."""
    d, column = sum(part.shape[-1] for part in parts), 0
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    whole = parts[0].new_empty(rows[0].shape[0], d + room)
    for part in rows:
        whole[:, column : column + part.shape[1]].copy_(part)
        column += part.shape[1]
    return whole


def leaving_room(op: str, kernel: Callable, room: int, place: int | None, *args):
    """Returns what ``kernel`` of ``op`` returns, with the output at ``place`` (None: the only one) in rows with room.

    Triton's kernels write such rows themselves.
    """
    if not room:
        return kernel(*args)
    if writes_where_told(op, kernel, args[0]):
        return kernel(*args, room)
    found = kernel(*args)
    if place is None:
        return _spread(found, room)
    return (*found[:place], _spread(found[place], room), *found[place + 1 :])


def writes_where_told(op: str, kernel: Callable, x: Tensor) -> bool:
    """Whether ``kernel`` of ``op`` is Triton's own for x, and not the reference that it hands other dtypes to."""
    if kernel is not kernel_of(op, "triton"):
        return False
    from petl_kernels.backends.triton import DTYPES  # it is there

    return x.dtype in DTYPES


def _spread(y: Tensor, room: int) -> Tensor:
    return roomy(y, y.shape, room).copy_(y)
