"""Inputs of ``bottleneck_adapter``, and the run of its kernels on them."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, sum_dtype


def bottleneck_adapter_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    d: int = 72,
    m: int = 24,
    bias: bool = True,
    norm: bool = True,
    parallel: bool = False,
    activation: str = "relu",
    scale: float = 1.0,
    adapter_dtype: torch.dtype | None = None,
) -> Given:
    adapter_dtype = adapter_dtype or draw.dtype
    down_bias = hidden_bias(draw, m, activation, adapter_dtype)
    return {
        "x": draw(*rows, d),
        "residual": draw(*rows, d) if parallel else None,
        "ln_weight": draw(d, dtype=adapter_dtype) if norm else None,
        "ln_bias": draw(d, dtype=adapter_dtype) if norm and bias else None,
        "down": draw(m, d, std=d**-0.5, dtype=adapter_dtype),
        "down_bias": down_bias if bias else None,
        "up": draw(d, m, std=m**-0.5, dtype=adapter_dtype),
        "up_bias": draw(d, dtype=adapter_dtype) if bias else None,
        "eps": 1e-5,
        "activation": activation,
        "scale": scale,
        "dy": draw(*rows, d),
    }


def hidden_bias(draw: Source, size: int, activation: str, dtype: torch.dtype) -> Tensor:
    bias = draw(size, dtype=dtype)
    if activation == "relu" and draw.dtype.itemsize == 2:
        # Rounding may put a z near 0 on the other side of the kink, in the reference as in a kernel: stay away from it.
        bias = torch.tensor([5.0, -5.0]).repeat(size)[:size].to(bias)
    return bias


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("bottleneck_adapter"), kernel("bottleneck_adapter_backward")
    x, residual, up_bias = given["x"], given["residual"], given["up_bias"]
    norm = [given[name] for name in ("ln_weight", "ln_bias")]
    options = [given[name] for name in ("eps", "activation", "scale")]
    down, down_bias, up = given["down"], given["down_bias"], given["up"]
    y = forward(x, residual, *norm, down, down_bias, up, up_bias, *options)
    grads = backward(given["dy"], x, residual is None, *norm, down, down_bias, up, *options, True, up_bias is not None)
    names = ("dx", "dln_weight", "dln_bias", "ddown", "ddown_bias", "dup", "dup_bias")
    present = (True, *(p is not None for p in (*norm, down, down_bias, up, up_bias)))
    values = {name: grad for name, grad, there in zip(names, grads, present, strict=True) if there}
    if up_bias is not None:
        values["dup_bias"] = sum_dtype(values["dup_bias"])
    return {"y": y, **values}


def _relu(device: torch.device, dtype: torch.dtype) -> Given:
    return bottleneck_adapter_arguments(Source(device, dtype), rows=(33,))


def _gelu_fp32_adapter(device: torch.device, dtype: torch.dtype) -> Given:
    return bottleneck_adapter_arguments(
        Source(device, dtype), rows=(3, 43), activation="gelu", adapter_dtype=torch.float32
    )


def _silu_parallel(device: torch.device, dtype: torch.dtype) -> Given:
    return bottleneck_adapter_arguments(
        Source(device, dtype),
        rows=(17,),
        bias=False,
        norm=False,
        parallel=True,
        activation="silu",
        scale=4.0,
    )


CASES = {"bottleneck_adapter": OpCases((_relu, _gelu_fp32_adapter, _silu_parallel), run)}
