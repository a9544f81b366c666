"""Inputs of ``capped_attention``, and the run of its kernels on them."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values


def capped_attention_arguments(
    draw: Source,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    queries: int = 9,
    keys: int = 13,
    d: int = 8,
    mask: bool = True,
    cap: float = 1.5,
    dropout: float = 0.0,
    prefix: int = 0,
) -> Given:
    """Returns arguments by name; mask: hides the last keys of each sentence but the first, and a window of others."""

    def heads_of(length: int, count: int) -> Tensor:
        return draw(batch, length, count, d).transpose(1, 2)

    hidden = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row in range(batch):
        hidden[row, :, :, keys - row :] = True
    hidden[:, :, :1, 1:4] = True
    added = torch.zeros(hidden.shape, dtype=draw.dtype).masked_fill(hidden, torch.finfo(draw.dtype).min)
    return {
        "q": heads_of(queries, heads),
        "k": heads_of(keys, groups),
        "v": heads_of(keys, groups),
        "mask": added.to(draw.device) if mask else None,
        "prefix_k": draw(prefix, groups, d) if prefix else None,
        "prefix_v": draw(prefix, groups, d) if prefix else None,
        "cap": cap,
        "scale": 2 * d**-0.5,
        "dropout": dropout,
        "seed": draw.seed() if dropout else None,
        "do": heads_of(queries, heads),
    }


def run(kernel: Kernels, given: Given) -> Values:
    given = dict(given)
    do, q, k, v = (given.pop(name) for name in ("do", "q", "k", "v"))
    rest = list(given.values())
    o = kernel("capped_attention")(q, k, v, *rest)
    names = "dq", "dk", "dv", "dprefix_k", "dprefix_v"
    grads = kernel("capped_attention_backward")(do, q, k, v, o, *rest)
    return {"o": o, **dict(zip(names, grads, strict=True))}


def _grouped(device: torch.device, dtype: torch.dtype) -> Given:
    return capped_attention_arguments(Source(device, dtype))


def _prefixed(device: torch.device, dtype: torch.dtype) -> Given:
    return capped_attention_arguments(Source(device, dtype), prefix=3, groups=1, dropout=0.2, cap=0.0)


CASES = {"capped_attention": OpCases((_grouped, _prefixed), run)}
