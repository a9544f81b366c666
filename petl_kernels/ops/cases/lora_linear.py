"""Inputs of ``lora_linear``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, held, sum_dtype


def lora_linear_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    ns: tuple[int, ...] = (40,),
    k: int = 72,
    ranks: tuple[int, ...] = (4,),
    bias: bool = True,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
) -> Given:
    adapter_dtype = adapter_dtype or draw.dtype
    return {
        "x": draw(*rows, k),
        "weights": [draw(n, k, std=k**-0.5) for n in ns],
        "biases": [draw(n) if bias else None for n in ns],
        "a": [draw(r, k, std=k**-0.5, dtype=adapter_dtype) for r in ranks],
        "b": [draw(n, r, dtype=adapter_dtype) for n, r in zip(ns, ranks, strict=True)],
        "scales": [2.0 - 0.5 * g for g in range(len(ns))],
        "dropout": dropout,
        "seed": draw.seed() if dropout else None,
        "dys": [draw(*rows, n) for n in ns],
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("lora_linear"), kernel("lora_linear_backward")
    fixed = [given[name] for name in ("weights", "biases", "a", "b", "scales", "dropout", "seed")]
    weights, biases, *adapters = fixed
    weights = [part for weight in weights for part in held(weight)]
    ys, s = forward(given["x"], weights, biases, *adapters)
    need_dbias = [bias is not None for bias in biases]
    dx, da, db, dbias = backward(given["dys"], given["x"], s, weights, *adapters, True, need_dbias)
    values = {"s": s, "dx": dx}
    for g in range(len(ys)):
        values |= {f"y{g}": ys[g], f"da{g}": da[g], f"db{g}": db[g], f"dbias{g}": sum_dtype(dbias[g])}
    return values


def _one_layer(device: torch.device, dtype: torch.dtype) -> Given:
    return lora_linear_arguments(Source(device, dtype), rows=(33,), bias=False)


def _group_with_dropout(device: torch.device, dtype: torch.dtype) -> Given:
    return lora_linear_arguments(
        Source(device, dtype),
        rows=(3, 43),
        ns=(40, 56),
        ranks=(4, 8),
        dropout=0.3,
        adapter_dtype=torch.float32,
    )


CASES = {"lora_linear": OpCases((_one_layer, _group_with_dropout), run)}
