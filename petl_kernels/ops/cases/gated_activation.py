"""Inputs of ``gated_activation``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.activation import activation_arguments
from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, no_additions


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("gated_activation"), kernel("gated_activation_backward")
    z, g, *options = (given[name] for name in ("z", "g", "kind", "dropout", "seed"))
    dz, dg = backward(given["dy"], z, g, *options)
    return {"y": forward(z, g, *options), "dz": dz, "dg": dg}


def _gated_gelu_tanh(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), rows=(33,), kind="gelu_tanh", gated=True)


def _gated_silu_with_dropout(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), rows=(3, 11), features=77, kind="silu", dropout=0.3, gated=True)


CASES = {"gated_activation": OpCases((_gated_gelu_tanh, _gated_silu_with_dropout), run, no_additions)}
