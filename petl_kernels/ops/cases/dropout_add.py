"""Inputs of ``dropout_add``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, no_additions


def dropout_add_arguments(
    draw: Source, rows: tuple[int, ...] = (17,), features: int = 72, p: float = 0.3, stream: torch.dtype | None = None
) -> Given:
    stream = stream or draw.dtype
    x, residual, dy = draw(*rows, features), draw(*rows, features, dtype=stream), draw(*rows, features, dtype=stream)
    return {"x": x, "residual": residual, "p": p, "seed": draw.seed(), "dy": dy}


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("dropout_add"), kernel("dropout_add_backward")
    x, residual, p, seed = (given[name] for name in ("x", "residual", "p", "seed"))
    return {"y": forward(x, residual, p, seed), "dx": backward(given["dy"], x.dtype, p, seed)}


def _one_dtype(device: torch.device, dtype: torch.dtype) -> Given:
    return dropout_add_arguments(Source(device, dtype), rows=(3, 11), features=77)


def _fp32_stream(device: torch.device, dtype: torch.dtype) -> Given:
    return dropout_add_arguments(Source(device, dtype), rows=(33,), stream=torch.float32)


CASES = {"dropout_add": OpCases((_one_dtype, _fp32_stream), run, no_additions)}
