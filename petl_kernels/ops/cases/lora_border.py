"""Inputs of ``lora_border``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, sum_dtype
from petl_kernels.ops.lora_border import room
from petl_kernels.ops.room import copied_rows


def lora_border_arguments(
    draw: Source,
    rows: int = 17,
    ns: tuple[int, ...] = (40, 24, 33),
    k: int = 72,
    ranks: tuple[int, ...] = (4, 0, 8),
    bias: bool = True,
    more: int = 0,
    adapter_dtype: torch.dtype | None = None,
) -> Given:
    """Returns arguments by name. The weights stand in ``border``, in which nothing else is set.

    more: room for other adapters. Every second linear has no bias.
    """

    r = room(sum(ranks)) + more
    weights = [draw(n, k, std=k**-0.5) for n in ns]
    border = weights[0].new_full((sum(ns) + r, k + r), torch.nan)
    border[: sum(ns), :k] = torch.cat(weights)
    return {
        "x": draw(rows, k),
        "border": border,
        "weights": weights,
        "biases": [draw(n if bias and i % 2 == 0 else 0) for i, n in enumerate(ns)],
        "a": [draw(r_g, k, std=k**-0.5, dtype=adapter_dtype) for r_g in ranks],
        "b": [draw(n, r_g, dtype=adapter_dtype) for n, r_g in zip(ns, ranks, strict=True)],
        "scales": [2.0 + i for i in range(len(ns))],
        "dys": [draw(rows, n) for n in ns],
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("lora_border"), kernel("lora_border_backward")
    x, biases, a, b, scales = (given[name] for name in ("x", "biases", "a", "b", "scales"))
    outputs, r = sum(b_g.shape[0] for b_g in b), room(sum(a_g.shape[0] for a_g in a))
    border = given["border"].clone()[: outputs + r, : x.shape[1] + r]
    need_dbias = [c.numel() > 0 for c in biases]
    bias = x.new_empty(outputs) if any(need_dbias) else None
    y, s = forward(copied_rows([x], r), border, bias, biases, a, b, scales)
    dys = copied_rows(given["dys"], r)
    dx, da, db, dbias = backward(dys, x, s, border, a, b, scales, True, need_dbias)
    values = {"y": y, "s": s, "dx": dx}
    for g, (own, need) in enumerate(zip(dbias, need_dbias, strict=True)):
        values |= {f"da{g}": da[g], f"db{g}": db[g], **({f"dbias{g}": sum_dtype(own)} if need else {})}
    return values


def _two_of_three(device: torch.device, dtype: torch.dtype) -> Given:
    return lora_border_arguments(
        Source(device, dtype), rows=43, ns=(40, 56, 40), ranks=(4, 0, 8), adapter_dtype=torch.float32
    )


def _frozen_together(device: torch.device, dtype: torch.dtype) -> Given:
    return lora_border_arguments(Source(device, dtype), ranks=(0, 0), ns=(40, 24), more=8)


CASES = {"lora_border": OpCases((_two_of_three, _frozen_together), run)}
