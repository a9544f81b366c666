"""Where the sentences of a packed row begin, on the way from a model to the attentions of its lean layers.

A model hands its layers masks, and nothing else of what is about sentences. So the boundaries travel on a mask: one
without a column, which transformers passes on as it is, and with which no attention but a lean one can work. What gives
this mask another place (a copy on another device, say) therefore ends in an error, never in other numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Boundaries(NamedTuple):
    """queries, keys: int32 (sentences + 1,), where each sentence begins and, at last, the number of tokens."""

    queries: Tensor
    keys: Tensor


def packed_mask(own: Tensor, readers: Tensor) -> Tensor:
    """A mask (1, 1, 1, 0) for tokens with the boundaries ``own``, which tokens with those of ``readers`` attend to too.

    The source's mask serves the encoder's self-attention and the decoder's cross-attention.
    """
    mask = torch.ones(1, 1, 1, 0, dtype=torch.bool, device=own.device)
    mask.petl_boundaries = own, readers
    return mask


def is_packed(mask: Tensor | None) -> bool:
    return hasattr(mask, "petl_boundaries")


def boundaries(mask: Tensor | None, self_attention: bool) -> Boundaries | None:
    """What a ``packed_mask`` says of an attention's queries and keys; None for any other mask."""
    if not is_packed(mask):
        return None
    own, readers = mask.petl_boundaries
    return Boundaries(own if self_attention else readers, own)
