"""Inputs of ``rms_norm``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values
from petl_kernels.ops.cases.layer_norm import layer_norm_arguments


def rms_norm_arguments(
    draw: Source, rows: tuple[int, ...] = (17,), d: int = 72, parameter_dtype: torch.dtype | None = None
) -> Given:
    given = layer_norm_arguments(draw, rows, d, False, parameter_dtype)
    return {name: value for name, value in given.items() if name != "bias"}


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("rms_norm"), kernel("rms_norm_backward")
    from_statistics = kernel("rms_norm_from_statistics")
    x, weight = given["x"], given["weight"]
    y, rstd = forward(x, weight, given["eps"])
    dx, dweight = backward(given["dy"], x, rstd, weight, True, True)
    return {"y": y, "again": from_statistics(x, rstd, weight), "dx": dx, "dweight": dweight}


def _rms(device: torch.device, dtype: torch.dtype) -> Given:
    return rms_norm_arguments(Source(device, dtype), rows=(3, 43))


def _rms_fp32_weight(device: torch.device, dtype: torch.dtype) -> Given:
    return rms_norm_arguments(Source(device, dtype), rows=(33,), parameter_dtype=torch.float32)


CASES = {"rms_norm": OpCases((_rms, _rms_fp32_weight), run)}
