"""Inputs of ``linear_cross_entropy``, and the run of its kernels on them, by rows and by words."""

from __future__ import annotations

import dataclasses

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, held
from petl_kernels.ops.linear_cross_entropy import compute, kernels_from
from petl_kernels.ops.loss_options import LossOptions, Needs
from petl_kernels.ops.quantized.storage import is_quantized


def linear_cross_entropy_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    d: int = 24,
    words: int = 72,
    bias: bool = True,
    label_smoothing: float = 0.1,
    smoothing: str = "uniform",
    logit_scale: float = 1.0,
    chunk_rows: int = 7,
    dlosses: bool = False,
    weight_dtype: torch.dtype | None = None,
    counted: int = -1,
    frozen: bool = False,
    softcap: float = 0.0,
) -> Given:
    labels = torch.randint(0, words, rows, generator=draw.generator)
    labels.view(-1)[2::5] = -100
    return {
        "hidden": draw(*rows, d),
        "weight": draw(words, d, std=2 * d**-0.5, dtype=weight_dtype),
        "labels": labels.to(draw.device),
        "bias": draw(words) if bias else None,
        "label_smoothing": label_smoothing,
        "smoothing": smoothing,
        "logit_scale": logit_scale,
        "ignore_index": -100,
        "chunk_bytes": chunk_rows * words * draw.dtype.itemsize,
        "counted": counted,
        "softcap": softcap,
        "dlosses": draw(labels.numel(), dtype=torch.float32) if dlosses else None,
        "frozen": frozen,
    }


def run(kernel: Kernels, given: Given) -> Values:
    weight = held(given["weight"])
    options = LossOptions(**{field.name: given[field.name] for field in dataclasses.fields(LossOptions)})
    needs = Needs(True, not is_quantized(weight) and not given["frozen"], given["bias"] is not None)
    tensors = given["hidden"], weight, given["labels"], given["bias"], given["dlosses"]
    losses, dhidden, dweight, dbias, _ = compute(kernels_from(kernel), *tensors, options, needs)
    return {"losses": losses, "dhidden": dhidden, "dweight": dweight, "dbias": dbias}


def _uniform(device: torch.device, dtype: torch.dtype) -> Given:
    return linear_cross_entropy_arguments(Source(device, dtype), rows=(3, 11))


def _fairseq_scaled_rows(device: torch.device, dtype: torch.dtype) -> Given:
    return linear_cross_entropy_arguments(
        Source(device, dtype), (17,), words=131, bias=False, smoothing="fairseq", logit_scale=0.5, dlosses=True
    )


def _no_smoothing(device: torch.device, dtype: torch.dtype) -> Given:
    return linear_cross_entropy_arguments(Source(device, dtype), rows=(17,), label_smoothing=0.0)


def _frozen_table(device: torch.device, dtype: torch.dtype) -> Given:
    """Returns a loss by words, in several blocks; a likely last word makes some rows rescale their sums."""
    options: Given = {"words": 2100, "bias": False, "frozen": True, "chunk_rows": 3}
    given = linear_cross_entropy_arguments(Source(device, dtype), (31,), **options)
    given["weight"][-1] *= 30
    return given


def _capped(device: torch.device, dtype: torch.dtype) -> Given:
    return linear_cross_entropy_arguments(Source(device, dtype), (17,), logit_scale=0.5, softcap=1.5)


CASES = {"linear_cross_entropy": OpCases((_uniform, _fairseq_scaled_rows, _no_smoothing, _frozen_table, _capped), run)}
