"""The calls of a user on a model: adapt, switch, merge, lean and report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from petl_kernels.errors import InputError, shown
from petl_kernels.layers.lean_model import lean_model
from petl_kernels.methods.adapt import adapt, trainable_parameters, use_adapter
from petl_kernels.methods.merge import merge, unmerge
from petl_kernels.models.structure import check_model
from petl_kernels.planning.planner import tiers_in_place
from petl_kernels.reporting import Report, report

__all__ = ["Report", "adapt", "lean", "merge", "report", "trainable_parameters", "unmerge", "use_adapter"]


def lean(
    model: nn.Module,
    tier: int | Sequence[int] | Literal["auto"] = 2,
    *,
    memory: str | int | None = None,
    batch_tokens: int = 4096,
    max_length: int = 256,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """Lets ``model`` keep less between forward and backward, with the same gradients; in place, returns the model.

    tier: for all layers, or a list with one for each layer, encoder first. What a layer keeps of each token:
        1  its input, q, k, v, the attentions' outputs, the sums between its blocks, one bit for each ReLU
        2  as 1 without q, k and v, which are computed again (and fc1 where the activation is not ReLU)
        3  as 2 without the sums, which are computed again through the output projections
        4  its input, and everything is computed again
        5  as 4, with the input in host memory
        0  what it kept before ``lean``
    "auto": for each layer the tier with the least work, such that a step fits into ``memory`` bytes ("8GiB"; all that
    is free, when not given) with AdamW on batches of ``batch_tokens`` padded tokens of the longer side, in sentences of
    up to ``max_length``, under torch.autocast in the dtype ``autocast``, if any. It sets tiers and the loss' chunk;
    weights stay as and where they are. ``plan`` has more levers. The keyword arguments are for "auto" alone.
    ``model(labels=...)`` then computes the loss without logits, in models whose own loss is known to be the
    cross-entropy of logits. They stand in the output as before and are made when they are read, which raises
    RuntimeError where weights have changed since.
    Layers and models that cannot be lean stay as they are; ``report`` names them, with the reason.
    Raises InputError for a tier that does not exist, for a list of another length, and with "auto" for what does not
    fit (with the bytes it needs), for a memory that is no size and for a model of another family.
    """
    check_model(model)
    if isinstance(tier, str) and tier == "auto":
        return lean_model(model, *tiers_in_place(model, memory, batch_tokens, max_length, autocast))
    if memory is not None:
        raise InputError(f"memory {shown(memory)}: expected with tier 'auto' only, and tier is {shown(tier)}")
    return lean_model(model, tier)
