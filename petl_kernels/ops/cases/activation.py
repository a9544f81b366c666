"""Inputs of ``activation``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, no_additions


def activation_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    features: int = 72,
    kind: str = "relu",
    dropout: float = 0.0,
    gated: bool = False,
) -> Given:
    z = draw(*rows, features, std=2.0)
    gate = {"g": draw(*rows, features)} if gated else {}
    seed = draw.seed() if dropout else None
    return {"z": z, **gate, "kind": kind, "dropout": dropout, "seed": seed, "dy": draw(*rows, features)}


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("activation"), kernel("activation_backward")
    z, options = given["z"], [given[name] for name in ("kind", "dropout", "seed")]
    y, bits = forward(z, *options)
    return {"y": y, "dz": backward(given["dy"], bits if given["kind"] == "relu" else z, *options)}


def _packed_relu(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), rows=(33,), features=77)


def _gelu_with_dropout(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), rows=(3, 11), kind="gelu", dropout=0.3)


def _gelu_tanh(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), kind="gelu_tanh")


def _silu(device: torch.device, dtype: torch.dtype) -> Given:
    return activation_arguments(Source(device, dtype), kind="silu")


CASES = {"activation": OpCases((_packed_relu, _gelu_with_dropout, _gelu_tanh, _silu), run, no_additions)}
