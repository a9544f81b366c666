"""The shipped pair of functions with a candidate's launches in the place of its own.

A candidate takes at most three dense linears and no dropout. It launches through ``common.launch``, so that the
ahead-of-time check sees what it would run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from petl_kernels.backends.triton import common, config
from petl_kernels.backends.triton import lora_linear as shipped


def pair(outputs: Callable, gradients: Callable) -> SimpleNamespace:
    """``lora_linear`` and ``lora_linear_backward`` with the shipped signatures, made of these launches."""

    def lora_linear(x, weights, biases, a, b, scales, dropout, seed):
        assert dropout == 0 and len(weights) <= config.MAX_GROUPS
        rows = common.as_rows(x)
        s = x.new_empty(rows.shape[0], sum(m.shape[0] for m in a))
        ys = [x.new_empty(rows.shape[0], m.shape[0]) for m in b]
        outputs(ys, s, rows, weights, biases, shipped._same_dtype(a), shipped._same_dtype(b), scales)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], s

    def lora_linear_backward(dys, x, s, weights, a, b, scales, dropout, seed, need_dx, need_dbias):
        assert dropout == 0 and need_dx
        rows, dys = common.as_rows(x), [common.as_rows(dy) for dy in dys]
        dx, da, db = torch.empty_like(rows), [torch.empty_like(m) for m in a], [torch.empty_like(m) for m in b]
        sizes = [m.shape[0] if need else 0 for m, need in zip(b, need_dbias, strict=True)]
        dbias = [x.new_empty(n, dtype=torch.float32) for n in sizes]
        adapters = shipped._same_dtype(a), shipped._same_dtype(b)
        gradients(dx, da, db, dbias, dys, rows, s, weights, *adapters, scales)
        return dx.view(x.shape), da, db, dbias

    return SimpleNamespace(lora_linear=lora_linear, lora_linear_backward=lora_linear_backward)
