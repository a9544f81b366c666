"""Inputs of ``dropout_add_norm``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values


def dropout_add_norm_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    d: int = 72,
    p: float = 0.3,
    centred: bool = True,
    bias: bool = True,
    stream: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    more: bool = True,
) -> Given:
    """Returns arguments by name. more: h has a gradient from elsewhere, like in a layer with its norms in front."""
    stream, parameter_dtype = stream or draw.dtype, parameter_dtype or draw.dtype
    wide = torch.promote_types(draw.dtype, stream)
    return {
        "y": draw(*rows, d),
        "residual": draw(*rows, d, dtype=stream),
        "weight": draw(d, dtype=parameter_dtype),
        "bias": draw(d, dtype=parameter_dtype) if bias and centred else None,
        "eps": 1e-5,
        "p": p,
        "seed": draw.seed() if p else None,
        "centred": centred,
        "du": draw(*rows, d, dtype=torch.promote_types(wide, parameter_dtype)),
        "dh": draw(*rows, d, dtype=wide) if more else None,
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("dropout_add_norm"), kernel("dropout_add_norm_backward")
    y, weight, bias, p, seed, centred = (given[name] for name in ("y", "weight", "bias", "p", "seed", "centred"))
    h, u, mean, rstd = forward(y, given["residual"], weight, bias, given["eps"], p, seed, centred)
    mean, needs = mean if centred else None, (True, bias is not None)
    dropout = y.dtype, p, seed
    dh, dy, dweight, dbias = backward(given["du"], given["dh"], h, mean, rstd, weight, *dropout, *needs)
    return {"h": h, "u": u, "dresidual": dh, "dy": dy, "dweight": dweight, "dbias": dbias}


def _sum_and_norm(device: torch.device, dtype: torch.dtype) -> Given:
    return dropout_add_norm_arguments(Source(device, dtype), rows=(3, 43))


def _fp32_stream_and_norm(device: torch.device, dtype: torch.dtype) -> Given:
    return dropout_add_norm_arguments(
        Source(device, dtype), rows=(33,), d=61, stream=torch.float32, parameter_dtype=torch.float32, more=False
    )


def _sum_and_rms(device: torch.device, dtype: torch.dtype) -> Given:
    return dropout_add_norm_arguments(Source(device, dtype), p=0.0, centred=False)


CASES = {"dropout_add_norm": OpCases((_sum_and_norm, _fp32_stream_and_norm, _sum_and_rms), run)}
