"""Inputs of ``frozen_ffn``, and the run of its kernels on them."""

from __future__ import annotations

import torch

from petl_kernels.ops.cases.case import Given, Kernels, OpCases, Source, Values, held
from petl_kernels.ops.frozen_ffn import what_to_keep


def frozen_ffn_arguments(
    draw: Source,
    rows: tuple[int, ...] = (17,),
    d: int = 40,
    f: int = 72,
    bias: bool = True,
    gated: bool = False,
    activation: str = "relu",
    recompute: bool = False,
) -> Given:
    return {
        "x": draw(*rows, d),
        "w1": draw(f, d, std=d**-0.5),
        "c1": draw(f) if bias else None,
        "w2": draw(d, f, std=f**-0.5),
        "c2": draw(d) if bias else None,
        "gate": draw(f, d, std=d**-0.5) if gated else None,
        "activation": activation,
        "recompute": recompute,
        "dy": draw(*rows, d),
    }


def run(kernel: Kernels, given: Given) -> Values:
    forward, backward = kernel("frozen_ffn"), kernel("frozen_ffn_backward")
    x, c1, c2, activation = (given[name] for name in ("x", "c1", "c2", "activation"))
    w1, w2, gate = (held(given[name]) for name in ("w1", "w2", "gate"))
    keeps = what_to_keep(activation, bool(gate), given["recompute"])
    y, *kept = forward(x, w1, c1, w2, c2, gate, activation, keeps)
    needs = (True, c1 is not None, c2 is not None)
    dx, dc1, dc2 = backward(
        given["dy"], x if keeps == "x" else None, *kept, w1, c1, w2, gate, activation, keeps, *needs
    )
    return {"y": y, "dx": dx, "dc1": dc1, "dc2": dc2}


def _relu_bits(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_ffn_arguments(Source(device, dtype), rows=(3, 43), f=75)


def _relu_bits_in_whole_words(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_ffn_arguments(Source(device, dtype), rows=(130,), d=64, f=256)


def _gelu_recomputed(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_ffn_arguments(Source(device, dtype), activation="gelu", recompute=True)


def _gelu_tanh_gated(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_ffn_arguments(Source(device, dtype), rows=(33,), bias=False, gated=True, activation="gelu_tanh")


def _silu_kept(device: torch.device, dtype: torch.dtype) -> Given:
    return frozen_ffn_arguments(Source(device, dtype), activation="silu")


CASES = {
    "frozen_ffn": OpCases((_relu_bits, _relu_bits_in_whole_words, _gelu_recomputed, _gelu_tanh_gated, _silu_kept), run)
}
