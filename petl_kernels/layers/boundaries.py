"""The boundaries of a packed row's sentences, on the way from a model to the attentions of its lean layers.

A model hands its layers masks, and nothing else that is about sentences. So the boundaries are an attribute of a mask:
one without a column, which transformers passes on as it is, and which no attention but a lean one can use. A copy of
it, on another device, say, has lost them, and ends in an error, never in other numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Boundaries(NamedTuple):
    """queries, keys: int32 (sentences + 1,), the first token of each sentence, and the number of tokens at the end."""

    queries: Tensor
    keys: Tensor


def packed_mask(own: Tensor, readers: Tensor) -> Tensor:
    """Returns a mask (1, 1, 1, 0) for keys with the boundaries ``own``.

    readers: the boundaries of the queries of a cross-attention to them. The source's mask serves both the encoder's
    self-attention and the decoder's cross-attention.
    """
    mask = torch.ones(1, 1, 1, 0, dtype=torch.bool, device=own.device)
    mask.petl_boundaries = own, readers  # pyright: ignore[reportAttributeAccessIssue]  a mark on the tensor
    return mask


def is_packed(mask: Tensor | None) -> bool:
    """Returns whether ``mask`` is a ``packed_mask``."""
    return hasattr(mask, "petl_boundaries")


def boundaries(mask: Tensor | None, self_attention: bool) -> Boundaries | None:
    """Returns the boundaries of an attention's queries and keys; None for a mask that is no ``packed_mask``."""
    found = getattr(mask, "petl_boundaries", None)
    if found is None:
        return None
    own, readers = found
    return Boundaries(own if self_attention else readers, own)
