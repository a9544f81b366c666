"""Inputs of ``frozen_linear``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, sum_dtype


def frozen_linear_arguments(
    draw: Source, rows: tuple[int, ...] = (17,), n: int = 40, k: int = 72, bias: bool = True
) -> Given:
    return {
        "x": draw(*rows, k),
        "weight": draw(n, k, std=k**-0.5),
        "bias": draw(n) if bias else None,
        "dy": draw(*rows, n),
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("frozen_linear"), kernel("frozen_linear_backward")
    y = forward(given["x"], given["weight"], given["bias"])
    dx, dbias = backward(given["dy"], given["weight"], True, given["bias"] is not None)
    return {"y": y, "dx": dx, "dbias": sum_dtype(dbias)}


def _with_bias(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_linear_arguments(Source(device, dtype), rows=(33,))


def _without_bias(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_linear_arguments(Source(device, dtype), rows=(2, 9), bias=False)


CASES = {"frozen_linear": OpCases((_with_bias, _without_bias), run)}
