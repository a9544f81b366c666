"""Attention masks as the ops read them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels.layers.blocks import AttentionBlock
from petl_kernels.models.transformers_names import attention_implementation


def as_causal(mask: Tensor) -> Tensor:
    """Returns ``mask``, marked as one that hides later keys and nothing else: lean layers leave it out."""
    mask.petl_causal = True  # pyright: ignore[reportAttributeAccessIssue]  a mark on the tensor
    return mask


def is_causal(mask: Tensor | None) -> bool:
    """Returns whether ``mask`` was marked by ``as_causal``."""
    return getattr(mask, "petl_causal", False)


def as_added(
    block: AttentionBlock, mask: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Returns mask and bias with which ``ops.attention`` has the numbers of transformers' attention function.

    mask: bool (True: seen) or a number to add, (batch or 1, heads or 1, queries or 1, keys). bias: a position bias of
    that shape, or None. dtype: that of the queries.

    Both agree for a query that sees no key, too. transformers' eager function adds a mask as it is, and finfo.min
    leaves nothing of the scores beside it: such a query attends to every key alike. Its sdpa function does the same
    where there is a position bias, with finfo.min in the place of hidden keys' bias; in fp16, whose finfo.min leaves
    the scores, without that bias. Without a position bias sdpa gives 0 where a boolean mask shows no key.
    One exception: a query whose whole row of a mask is -inf gets 0 here in every case, and NaN from the eager function.
    """
    eager = str(attention_implementation(block.host.config)).endswith("eager")
    if eager:
        return _converted_once(mask, _added_by_eager, dtype), bias
    if not block.adds_bias:
        return mask, bias
    if dtype == torch.float16 and bias is not None:
        return None, torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask
    return _converted_once(mask, _added_by_sdpa, dtype), bias


def _converted_once(mask: Tensor, convert: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """Returns ``convert(mask, dtype)``, one tensor for all layers that read ``mask``."""
    if mask.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return convert(mask, dtype)
    key = convert, dtype, mask._version
    known, converted = getattr(mask, "petl_added", (None, None))  # on the mask, so that it goes when the mask goes
    if converted is not None and known == key:
        return converted
    converted = convert(mask, dtype)
    if converted is not mask:
        mask.petl_added = key, converted  # pyright: ignore[reportAttributeAccessIssue]  kept on the tensor
    return converted


def _added_by_eager(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.float16:
        return mask.float().masked_fill(mask == torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
    return mask.to(dtype) if mask.dtype == torch.bool else mask


def _added_by_sdpa(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
