"""Rows with free columns behind them: (..., d) as the first columns of a matrix (tokens, d + room) of its own.

A product over d + room columns then needs no copy of a norm's output, nor of the gradients of an attention
(``ops/lora_border.py``). A norm that is called with ``room`` returns its output in such rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel, takes_room


def roomy(like: Tensor, shape: Sequence[int], room: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty tensor of ``shape`` (..., d), whose rows are d + room apart."""
    *leading, d = shape
    return like.new_empty((*leading, d + room), dtype=dtype or like.dtype)[..., :d]


def whole_rows(parts: Sequence[Tensor], room: int) -> Tensor | None:
    """Returns the matrix (tokens, d + room) whose first columns ``parts`` are, each (..., d_i) with d = Σ d_i.

    Returns None where they do not stand side by side in such a matrix, or where it is not all of their memory.
    """
    leading, width = parts[0].shape[:-1], sum(part.shape[-1] for part in parts) + room
    tokens = math.prod(leading)
    if parts[0].untyped_storage().nbytes() != tokens * width * parts[0].itemsize:
        return None
    strides = [*(math.prod(leading[i + 1 :]) * width for i in range(len(leading))), 1]
    offset, storage = 0, parts[0].untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    for part in parts:
        same = all(size < 2 or a == b for size, a, b in zip(part.shape, part.stride(), strides, strict=True))
        own = part.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
        if not same or part.storage_offset() != offset or own != storage:
            return None
        offset += part.shape[-1]
    return parts[0].as_strided((tokens, width), (width, 1))


def copied_rows(parts: Sequence[Tensor], room: int) -> Tensor:
    """Returns a new matrix (tokens, d + room) with copies of ``parts`` in its first columns; the others are not set."""
    d, column = sum(part.shape[-1] for part in parts), 0
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    whole = parts[0].new_empty(rows[0].shape[0], d + room)
    for part in rows:
        whole[:, column : column + part.shape[1]].copy_(part)
        column += part.shape[1]
    return whole


def leaving_room(kernel: Kernel, room: int, place: int | None, *args: Any) -> Any:
    """Returns what ``kernel`` returns, with the output at ``place`` (None: the only one) in rows with ``room`` behind.

    A kernel that takes the room as its last argument (``dispatch.takes_room``) writes such rows itself; the output of
    any other is copied into them.
    """
    if not room:
        return kernel(*args)
    if takes_room(kernel, args[0].dtype):
        return kernel(*args, room)
    found = kernel(*args)
    if place is None:
        return _spread(found, room)
    return (*found[:place], _spread(found[place], room), *found[place + 1 :])


def _spread(y: Tensor, room: int) -> Tensor:
    return roomy(y, y.shape, room).copy_(y)
