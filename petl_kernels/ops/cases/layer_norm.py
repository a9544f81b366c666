"""Inputs of ``layer_norm``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values


def layer_norm_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    d: int = 72,
    bias: bool = True,
    parameter_dtype: torch.dtype | None = None,
) -> Given:
    parameter_dtype = parameter_dtype or draw.dtype
    return {
        "x": draw(*rows, d),
        "weight": draw(d, dtype=parameter_dtype),
        "bias": draw(d, dtype=parameter_dtype) if bias else None,
        "eps": 1e-5,
        "dy": draw(*rows, d, dtype=torch.promote_types(draw.dtype, parameter_dtype)),
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("layer_norm"), kernel("layer_norm_backward")
    from_statistics = kernel("layer_norm_from_statistics")
    x, weight, bias, dy = (given[name] for name in ("x", "weight", "bias", "dy"))
    y, mean, rstd = forward(x, weight, bias, given["eps"])
    again = from_statistics(x, mean, rstd, weight, bias)
    dx, dweight, dbias = backward(dy, x, mean, rstd, weight, True, True, bias is not None)
    return {"y": y, "again": again, "dx": dx, "dweight": dweight, "dbias": dbias}


def _norm(device: torch.device, dtype: torch.dtype) -> Given:
    return layer_norm_arguments(Source(device, dtype), rows=(3, 43))


def _norm_fp32_parameters(device: torch.device, dtype: torch.dtype) -> Given:
    return layer_norm_arguments(Source(device, dtype), rows=(33,), parameter_dtype=torch.float32)


def _norm_without_bias(device: torch.device, dtype: torch.dtype) -> Given:
    return layer_norm_arguments(Source(device, dtype), bias=False)


CASES = {"layer_norm": OpCases((_norm, _norm_fp32_parameters, _norm_without_bias), run)}
