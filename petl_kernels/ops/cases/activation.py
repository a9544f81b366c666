"""Inputs of ``activation``, and the run of its kernels on them."""

from __future__ import annotations

from petl_kernels.ops.cases.case import Kernels, OpCases, Source, Values, no_additions


def activation_arguments(draw: Source, rows=(17,), features=72, kind="relu", dropout=0.0, gated=False) -> dict:
    z = draw(*rows, features, std=2.0)
    gate = {"g": draw(*rows, features)} if gated else {}
    seed = draw.seed() if dropout else None
    return {"z": z, **gate, "kind": kind, "dropout": dropout, "seed": seed, "dy": draw(*rows, features)}


def run(kernel: Kernels, given: dict) -> Values:
    forward, backward = kernel("activation"), kernel("activation_backward")
    z, options = given["z"], [given[name] for name in ("kind", "dropout", "seed")]
    y, bits = forward(z, *options)
    return {"y": y, "dz": backward(given["dy"], bits if given["kind"] == "relu" else z, *options)}


def _packed_relu(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(33,), features=77)


def _gelu_with_dropout(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(3, 11), kind="gelu", dropout=0.3)


def _gelu_tanh(device, dtype):
    return activation_arguments(Source(device, dtype), kind="gelu_tanh")


def _silu(device, dtype):
    return activation_arguments(Source(device, dtype), kind="silu")


CASES = {"activation": OpCases((_packed_relu, _gelu_with_dropout, _gelu_tanh, _silu), run, no_additions)}
