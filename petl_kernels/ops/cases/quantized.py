"""Inputs of the ops on quantized weights, and the runs of their kernels on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, held, no_additions, normal
from petl_kernels.ops.quantized.storage import reference_dequantize
from petl_kernels.ops.quantized.tensor import quantize


def quantized_weight(draw: Source, n: int, k: int, storage: str) -> Tensor:
    """Returns a weight (n, k) in ``storage``, rounded on the CPU so that its bits are the same for every backend."""

    dense = normal(draw.generator, n, k) * k**-0.5
    return quantize(dense.to(draw.dtype), storage).to(draw.device)


def quantized_project_arguments(
    draw: Source, rows: int = 17, n: int = 40, k: int = 72, storage: str = "nf4", bias: bool = True
) -> Given:
    return {
        "x": draw(rows, k),
        "weight": quantized_weight(draw, n, k, storage),
        "bias": draw(n) if bias else None,
        "dy": draw(rows, n),
    }


def _run_quantize(op: str) -> Callable[[Kernels, Given], Values]:
    def run(kernel: Kernels, given: Given) -> Values:
        weight = given["weight"]
        rows, columns = weight.shape
        return {"w": reference_dequantize(list(kernel(op)(weight)), 0, rows, columns, torch.float32)}

    return run


def _run_dequantize(kernel: Kernels, given: Given) -> Values:
    forward = kernel("dequantize")
    weight, first = given["weight"], given["first_row"]
    return {"w": forward(held(weight), first, weight.shape[0] - first, weight.shape[1], weight.dtype)}


def _run_project(kernel: Kernels, given: Given) -> Values:
    forward, back = kernel("quantized_project"), kernel("quantized_project_back")
    parts = held(given["weight"])
    return {"y": forward(given["x"], parts, given["bias"]), "dx": back(given["dy"], parts)}


def _run_embedding(kernel: Kernels, given: Given) -> Values:
    forward = kernel("quantized_embedding")
    weight = given["weight"]
    return {"y": forward(given["ids"], held(weight), weight.shape[1], weight.dtype)}


def _matrix(device: torch.device, dtype: torch.dtype) -> Given:
    return {"weight": Source(device, dtype)(33, 75)}


def _int8_rows(device: torch.device, dtype: torch.dtype) -> Given:
    return {"weight": quantized_weight(Source(device, dtype), 33, 75, "int8"), "first_row": 5}


def _nf4_rows(device: torch.device, dtype: torch.dtype) -> Given:
    return {"weight": quantized_weight(Source(device, dtype), 33, 75, "nf4"), "first_row": 5}


def _int8_product(device: torch.device, dtype: torch.dtype) -> Given:
    return quantized_project_arguments(Source(device, dtype), storage="int8")


def _nf4_product(device: torch.device, dtype: torch.dtype) -> Given:
    return quantized_project_arguments(Source(device, dtype), rows=33, n=96, k=128)


def _nf4_odd_product(device: torch.device, dtype: torch.dtype) -> Given:
    return quantized_project_arguments(Source(device, dtype), rows=129, n=33, k=75, bias=False)


def _int8_ids(device: torch.device, dtype: torch.dtype) -> Given:
    weight = quantized_weight(Source(device, dtype), 33, 75, "int8")
    return {"weight": weight, "ids": torch.tensor([0, 32, 7, 7, 1], device=device)}


def _nf4_ids(device: torch.device, dtype: torch.dtype) -> Given:
    weight = quantized_weight(Source(device, dtype), 33, 75, "nf4")
    return {"weight": weight, "ids": torch.tensor([0, 32, 7, 7, 1], device=device)}


CASES = {
    "quantize_int8": OpCases((_matrix,), _run_quantize("quantize_int8"), no_additions),
    "quantize_nf4": OpCases((_matrix,), _run_quantize("quantize_nf4"), no_additions),
    "dequantize": OpCases((_int8_rows, _nf4_rows), _run_dequantize, no_additions),
    "quantized_project": OpCases((_int8_product, _nf4_product, _nf4_odd_product), _run_project),
    "quantized_embedding": OpCases((_int8_ids, _nf4_ids), _run_embedding, no_additions),
}
