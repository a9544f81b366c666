"""An activation, with dropout after it.

    y     = drop(act(z))
    dz    = drop(dy) ⊙ act'(z)

act is "relu", "gelu" (erf), "silu" or "gelu_tanh" (0.5 z (1 + tanh(√(2/π) (z + 0.044715 z³)))). z, y (..., features),
of one dtype (bf16, fp16, fp32, fp64); both directions are computed in fp32 and rounded once. A ReLU's derivative is 0
at 0, and 1 at NaN. The dropout mask is recomputed from a seed (``petl_kernels/ops/philox.py``).

Saves: relu: one bit an element, z > 0 (or NaN), ceil(features / 8) bytes per token: bit j % 8 of byte j // 8 of a
token is feature j. The others: z (2 bytes an element in bf16). 8 bytes in all for the seed. ``F.relu`` keeps y, which
the next linear layer needs as well if it is trained; if it is frozen nothing else does.
Source: GELU, arXiv 1606.08415; the rest is the derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.bits import pack_bits, packed_width, unpack_bits
from petl_kernels.ops.checks import check_activation
from petl_kernels.ops.define import accumulate_dtype, define, differentiate

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def activation(z: Tensor, kind: str, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Returns y = drop(act(z)); (..., features) -> (..., features).

    seed: int64 tensor of shape (1,) on z's device, drawn with ``philox.draw_seed`` when dropout > 0 and none is given.
    Raises InputError: z of rank 0 or not floating-point, an unknown kind, dropout outside [0, 1).
    """
    check_activation("activation", z, "z")
    check_kind("activation", kind)
    seed = philox.seed_for("activation", z, dropout, seed)
    y, _ = torch.ops.petl.activation(z, kind, float(dropout), seed, active())
    return y


def check_kind(op: str, kind: str) -> None:
    if kind not in ACTIVATIONS:
        raise InputError(f"{op}: activation is {kind!r}: expected one of {', '.join(ACTIVATIONS)}")


def derivative(kind: str, z: Tensor) -> Tensor:
    if kind == "relu":
        return (~(z <= 0)).to(z.dtype)
    if kind == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if kind == "gelu_tanh":
        slope = math.sqrt(2 / math.pi)
        t = torch.tanh(slope * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope * (1 + 3 * 0.044715 * z * z)
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


@register("activation", "reference")
def reference(z: Tensor, kind: str, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = z.reshape(-1, z.shape[-1])
    y = philox.dropout(ACTIVATIONS[kind](rows.to(accumulate_dtype(z.dtype))), dropout, seed)
    bits = pack_bits(~(rows <= 0)) if kind == "relu" else z.new_empty(0, dtype=torch.uint8)
    return y.to(z.dtype).view(z.shape), bits


@register("activation_backward", "reference")
def reference_backward(dy: Tensor, saved: Tensor, kind: str, dropout: float, seed: Tensor | None) -> Tensor:
    sums = accumulate_dtype(dy.dtype)
    dropped = philox.dropout(dy.reshape(-1, dy.shape[-1]).to(sums), dropout, seed)
    if kind == "relu":
        dz = torch.where(unpack_bits(saved, dy.shape[-1]), dropped, 0)
    else:
        dz = dropped * derivative(kind, saved.reshape(-1, dy.shape[-1]).to(sums))
    return dz.to(dy.dtype).view(dy.shape)


def _forward(z: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return dispatch("activation", z.device, backend, z.dtype)(z, kind, dropout, seed)


def _forward_fake(z: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    bits = (math.prod(z.shape[:-1]), packed_width(z.shape[-1])) if kind == "relu" else (0,)
    return z.new_empty(z.shape), z.new_empty(bits, dtype=torch.uint8)


def _backward(dy: Tensor, saved: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> Tensor:
    return dispatch("activation_backward", dy.device, backend, dy.dtype)(dy, saved, kind, dropout, seed)


def _backward_fake(dy: Tensor, saved: Tensor, kind: str, dropout: float, seed: Tensor | None, backend: str) -> Tensor:
    return dy.new_empty(dy.shape)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    z, ctx.kind, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(output[1] if ctx.kind == "relu" else z, seed)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor, _: Any) -> tuple[Any, ...]:
    saved, seed = ctx.saved_tensors
    dz = torch.ops.petl.activation_backward(dy, saved, ctx.kind, ctx.dropout, seed, ctx.backend)
    return dz, None, None, None, None


define(
    "activation",
    "(Tensor z, str kind, float dropout, Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "activation_backward",
    "(Tensor dy, Tensor saved, str kind, float dropout, Tensor? seed, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
differentiate("activation", _save, _gradients)
