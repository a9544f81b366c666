"""A gate through an activation, with dropout after it: the middle of a gated feed-forward block (GEGLU, SwiGLU).

    y     = drop(act(z) ⊙ g)
    dz    = drop(dy) ⊙ g ⊙ act'(z)
    dg    = drop(dy) ⊙ act(z)

act as in ``activation``. z, g, y (..., features), of one dtype (bf16, fp16, fp32, fp64); both directions are computed
in fp32 and rounded once. The dropout mask is recomputed from a seed (``petl_kernels/ops/philox.py``).

Saves: z and g (4 bytes an element in bf16); 8 bytes in all for the seed. Autograd keeps act(z) too, and with dropout
the product's mask.
Source: Shazeer, "GLU variants improve transformer", arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.activation import ACTIVATIONS, check_kind, derivative
from petl_kernels.ops.checks import check_activation, check_device, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate


def gated_activation(z: Tensor, g: Tensor, kind: str, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Returns y = drop(act(z) ⊙ g); (..., features) -> (..., features).

    seed: int64 tensor of shape (1,) on z's device, drawn with ``philox.draw_seed`` when dropout > 0 and none is given.
    Raises InputError: z of rank 0 or not floating-point, a g of another shape, dtype or device, an unknown kind,
    dropout outside [0, 1).
    """
    check_activation("gated_activation", z, "z")
    if g.shape != z.shape or g.dtype != z.dtype:
        raise InputError(
            f"gated_activation: g is {g.dtype} of shape {shape(g)}: expected that of z, {z.dtype} of {shape(z)}"
        )
    check_device("gated_activation", "g", g, z)
    check_kind("gated_activation", kind)
    seed = philox.seed_for("gated_activation", z, dropout, seed)
    return torch.ops.petl.gated_activation(z, g, kind, float(dropout), seed, active())


@register("gated_activation", "reference")
def reference(z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None) -> Tensor:
    z_rows, g_rows = _wide_rows(z), _wide_rows(g)
    return philox.dropout(ACTIVATIONS[kind](z_rows) * g_rows, dropout, seed).to(z.dtype).view(z.shape)


@register("gated_activation_backward", "reference")
def reference_backward(
    dy: Tensor, z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    dropped, z_rows, g_rows = philox.dropout(_wide_rows(dy), dropout, seed), _wide_rows(z), _wide_rows(g)
    dz = dropped * g_rows * derivative(kind, z_rows)
    dg = dropped * ACTIVATIONS[kind](z_rows)
    return dz.to(z.dtype).view(z.shape), dg.to(z.dtype).view(z.shape)


def _wide_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(accumulate_dtype(x.dtype))


def _forward(z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> Tensor:
    return dispatch("gated_activation", z.device, backend, z.dtype)(z, g, kind, dropout, seed)


def _forward_fake(z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> Tensor:
    return z.new_empty(z.shape)


def _backward(
    dy: Tensor, z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return dispatch("gated_activation_backward", z.device, backend, z.dtype)(dy, z, g, kind, dropout, seed)


def _backward_fake(
    dy: Tensor, z: Tensor, g: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    z, g, ctx.kind, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(z, g, seed)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    z, g, seed = ctx.saved_tensors
    dz, dg = torch.ops.petl.gated_activation_backward(dy, z, g, ctx.kind, ctx.dropout, seed, ctx.backend)
    need_dz, need_dg, *_ = needs
    return dz if need_dz else None, dg if need_dg else None, None, None, None, None


define(
    "gated_activation",
    "(Tensor z, Tensor g, str kind, float dropout, Tensor? seed, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "gated_activation_backward",
    "(Tensor dy, Tensor z, Tensor g, str kind, float dropout, Tensor? seed, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("gated_activation", _save, _gradients)
