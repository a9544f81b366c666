"""Inputs of ``attention``, the run of its kernels on them, and the sums behind its values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, tensors


def attention_arguments(
    draw: Source,
    batch: int = 2,
    heads: int = 3,
    queries: int = 17,
    keys: int = 17,
    d: int = 16,
    mask: str | None = None,
    bias: int = 0,
    causal: bool = False,
    dropout: float = 0.0,
    prefix: int = 0,
    scale: float | None = None,
    prefix_dtype: torch.dtype | None = None,
    sentences: Sequence[tuple[int, int]] = (),
    reach: int | None = None,
) -> Given:
    """Returns arguments by name. mask: None, "padding", "rows" (some queries see nothing), "additive" or "finfo".


    bias: its batch size, or 0; sentences: (queries, keys) of each in a packed row, in place of batch, queries and keys;
    reach: R of distance_bias.
    """
    if sentences:
        batch, (queries, keys) = 1, map(sum, zip(*sentences, strict=True))

    def heads_of(length: int) -> Tensor:
        return draw(batch, length, heads, d).transpose(1, 2)

    prefix_dtype = prefix_dtype or draw.dtype
    return {
        "q": heads_of(queries),
        "k": heads_of(keys),
        "v": heads_of(keys),
        "mask": attention_mask(draw, mask, batch, heads, queries, keys),
        "bias": draw(bias, heads, queries, keys) if bias else None,
        "prefix_k": draw(prefix, heads, d, dtype=prefix_dtype) if prefix else None,
        "prefix_v": draw(prefix, heads, d, dtype=prefix_dtype) if prefix else None,
        "causal": causal,
        "scale": d**-0.5 if scale is None else scale,
        "dropout": dropout,
        "seed": draw.seed() if dropout else None,
        "cu_seqlens_q": boundaries([pair[0] for pair in sentences], draw.device) if sentences else None,
        "cu_seqlens_k": boundaries([pair[1] for pair in sentences], draw.device) if sentences else None,
        "distance_bias": draw(heads, 2 * reach + 1) if reach is not None else None,
        "do": heads_of(queries),
    }


def boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns where sentences of these lengths begin in a packed row, and last their sum: int32 (sentences + 1,)."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attention_mask(draw: Source, kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "additive":
        return draw(1, heads, queries, keys, dtype=torch.float32)
    if kind == "padding":
        visible = draw(batch, 1, 1, keys, dtype=torch.float32) > -0.5
        visible[..., :1] = True
        return visible
    visible = draw(batch, 1, queries, keys, dtype=torch.float32) > 0
    visible[:, :, ::3] = False
    if kind == "rows":
        return visible
    lowest = torch.finfo(torch.float32).min
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, lowest)


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("attention"), kernel("attention_backward")
    q, k, v, bias, prefix_k, distance = (given[name] for name in ("q", "k", "v", "bias", "prefix_k", "distance_bias"))
    rest = [given[name] for name in ("mask", "bias", "prefix_k", "prefix_v", "causal", "scale", "dropout", "seed")]
    packed = given["cu_seqlens_q"], given["cu_seqlens_k"], distance
    o, lse = forward(q, k, v, *rest, *packed)
    grads = backward(given["do"], q, k, v, o, lse, *rest, bias is not None, *packed, distance is not None)
    names = ("dq", "dk", "dv", "dbias", "dprefix_k", "dprefix_v", "ddistance_bias")
    present = (True, True, True, *(x is not None for x in (bias, prefix_k, prefix_k, distance)))
    values = {name: grad for name, grad, there in zip(names, grads, present, strict=True) if there}
    # The lse of a query that sees nothing, or only what an additive mask all but hides, means nothing.
    return {"o": o, "lse": lse.masked_fill(lse.isinf() | (lse < -1e4), 0), **values}


def additions(value: str, given: Given) -> int:
    """Returns the additions behind one element of ``value``: over queries, keys and features, with the softmax's.

    A softmax turns the rounding of a score, relative to it, into one relative to 1: a score of 15 counts as 15²
    additions.
    """
    axes = {size for tensor in tensors(given) if tensor.dim() for size in tensor.shape[-2:]}
    if value == "ddistance_bias":  # all pairs of a query and a key may be equally far apart
        axes.add(given["q"].shape[0] * given["q"].shape[2] * given["k"].shape[2])
    return sum(axes) + math.ceil(_largest_score(given) ** 2)


def _largest_score(given: Given) -> float:
    scores = given["q"].double() @ given["k"].double().mT * given["scale"]
    return scores.abs().max().item() if scores.numel() else 0.0


def _causal_with_dropout(device: torch.device, dtype: torch.dtype) -> Given:
    return attention_arguments(Source(device, dtype), queries=37, keys=43, mask="padding", causal=True, dropout=0.3)


def _relative_bias(device: torch.device, dtype: torch.dtype) -> Given:
    return attention_arguments(Source(device, dtype), queries=33, keys=33, mask="rows", bias=1, scale=1.0)


def _prefix_of_cross_attention(device: torch.device, dtype: torch.dtype) -> Given:
    return attention_arguments(
        Source(device, dtype), queries=37, keys=70, d=24, mask="rows", prefix=5, prefix_dtype=torch.float32
    )


def _packed_sentences(device: torch.device, dtype: torch.dtype) -> Given:
    sentences = ((37, 43), (0, 5), (1, 1), (30, 18), (4, 0), (0, 0))
    return attention_arguments(
        Source(device, dtype), sentences=sentences, reach=9, causal=True, dropout=0.3, prefix=4, scale=1.0
    )


CASES = {
    "attention": OpCases(
        (_causal_with_dropout, _relative_bias, _prefix_of_cross_attention, _packed_sentences), run, additions
    )
}
