"""Tiers of a whole model: of its layers, and of its loss with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from petl_kernels.layers.lean import lean_layers
from petl_kernels.layers.loss.lean_loss import lean_loss, plain_loss, set_chunk_bytes


def lean_model(model: nn.Module, tier: int | Sequence[int], chunk_bytes: int | None = None) -> nn.Module:
    """Makes layers and loss of ``model`` lean, in place, and returns it; see ``petl_kernels.lean``.

    tier: for all layers, or one for each layer, encoder first; 0 for all brings the model's own loss back, too.
    chunk_bytes: the bytes of logits that the loss makes at a time; its own choice when not given.
    Raises InputError for a tier that does not exist and for a list of another length.
    """
    lean_layers(model, tier)
    if tier == 0:
        return plain_loss(model)
    lean_loss(model)
    if chunk_bytes is not None:
        set_chunk_bytes(model, chunk_bytes)
    return model
