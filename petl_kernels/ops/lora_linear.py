"""Linear layers with low-rank adapters that share one input: q, k and v read x once.

For each of G linear layers g, with s_g = drop(x) A_gᵀ:

    y_g   = x W_gᵀ + c_g + scale_g · s_g B_gᵀ

    ds_g  = scale_g · dy_g B_g
    dA_g  = ds_gᵀ drop(x)
    dB_g  = scale_g · dy_gᵀ s_g
    dx    = Σ_g dy_g W_g + drop'(Σ_g ds_g A_g)
    dc_g  = Σ_tokens dy_g

x (..., K), W_g (N_g, K), c_g (N_g,) or None, A_g (r_g, K), B_g (N_g, r_g), y_g (..., N_g), and s = [s_1 … s_G] of
shape (tokens, Σ r_g). x and W_g share a dtype (bf16, fp16, fp32, fp64); A_g, B_g and c_g may be wider: they are cast
to x.dtype for the products, sums are fp32, and their gradients come back in their own dtype. Dropout is one mask for
the whole group, recomputed from a seed (``petl_kernels/ops/philox.py``), so a group equals its members one by one.
W_g may be quantized (``ops/quantized``), each in its own storage: x W_gᵀ and dy_g W_g are then that file's products.

Saves: x, and s (2 Σ r_g bytes per token in bf16); 8 bytes in all for the seed. No mask, no copy of x.
Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.checks import check_activation, check_parameter, check_weight, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty, present
from petl_kernels.ops.quantized.products import project, project_back
from petl_kernels.ops.quantized.storage import parts_in, split_parts
from petl_kernels.ops.quantized.tensor import parts_of


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Returns y = x Wᵀ + c + scale · drop(x) Aᵀ Bᵀ; x (..., K) -> (..., N). See ``lora_linear_grouped``."""
    return lora_linear_grouped(x, [weight], [bias], [a], [b], [scale], dropout, seed)[0]


def lora_linear_grouped(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Returns the outputs (..., N_g) of G linear layers with adapters that read the same x (..., K).

    seed: int64 tensor of shape (1,) on x's device, drawn with ``torch.randint`` when dropout > 0 and none is given.
    Raises InputError: x of rank 0, lists of different lengths, shapes that do not fit, devices or dtypes of x and the
    weights that differ, a weight that requires grad, dropout outside [0, 1).
    """
    _check(x, weights, biases, a, b, scales)
    seed = philox.seed_for("lora_linear", x, dropout, seed)
    given = [empty(x) if bias is None else bias for bias in biases]
    scales = [float(scale) for scale in scales]
    parts = [part for weight in weights for part in parts_of(weight)]
    ys, _ = torch.ops.petl.lora_linear(x, parts, given, list(a), list(b), scales, float(dropout), seed, active())
    return ys


def _check(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], a: list[Tensor], b: list[Tensor], scales: list[float]
) -> None:
    op = "lora_linear"
    check_activation(op, x)
    lengths = [len(group) for group in (weights, biases, a, b, scales)]
    if lengths[0] == 0 or len(set(lengths)) > 1:
        raise InputError(
            f"{op}: {lengths} weights, biases, a, b and scales: expected the same number of each, one or more"
        )
    for weight, bias, a_g, b_g in zip(weights, biases, a, b, strict=True):
        check_weight(op, "weight", weight, x)
        if bias is not None:
            check_parameter(op, "bias", bias, (weight.shape[0],), x)
        if a_g.dim() != 2:
            raise InputError(f"{op}: a has shape {shape(a_g)}: expected (rank, {x.shape[-1]})")
        check_parameter(op, "a", a_g, (a_g.shape[0], x.shape[-1]), x)
        check_parameter(op, "b", b_g, (weight.shape[0], a_g.shape[0]), x)


@register("lora_linear", "reference")
def reference(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    s = philox.dropout(rows, dropout, seed) @ torch.cat(a).to(x.dtype).T
    ys: list[Tensor] = []
    for parts, bias, b_g, scale, s_g in zip(split_parts(weights), biases, b, scales, _split(s, a), strict=True):
        y = project(rows, parts, bias, "reference") + scale * (s_g @ b_g.to(x.dtype).T)
        ys.append(y.view(*x.shape[:-1], b_g.shape[0]))
    return ys, s


@register("lora_linear_backward", "reference")
def reference_backward(
    dys: list[Tensor],
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: list[bool],
):
    rows = x.reshape(-1, x.shape[-1])
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    ds = [scale * (dy @ b_g.to(x.dtype)) for dy, b_g, scale in zip(dys, b, scales, strict=True)]
    db = [
        (scale * (dy.T @ s_g)).to(b_g.dtype) for dy, s_g, b_g, scale in zip(dys, _split(s, a), b, scales, strict=True)
    ]
    dropped = philox.dropout(rows, dropout, seed)
    da = [(ds_g.T @ dropped).to(a_g.dtype) for ds_g, a_g in zip(ds, a, strict=True)]
    dx = empty(x)
    if need_dx:
        through_adapters = torch.cat(ds, 1) @ torch.cat(a).to(x.dtype)
        dx = philox.dropout(through_adapters, dropout, seed)
        for dy, parts in zip(dys, split_parts(weights), strict=True):
            dx = dx + project_back(dy, parts, "reference")
        dx = dx.view(x.shape)
    dbias = [
        dy.sum(0, dtype=accumulate_dtype(dy.dtype)) if need else empty(dy)
        for dy, need in zip(dys, need_dbias, strict=True)
    ]
    return dx, da, db, dbias


def _split(s: Tensor, a: list[Tensor]) -> tuple[Tensor, ...]:
    ranks = [a_g.shape[0] for a_g in a]
    return s.split(ranks, 1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    kernel = dispatch("lora_linear", x.device, backend, x.dtype)
    weights = parts_in(weights, x.dtype)
    given = [None if present(bias) is None else bias.to(x.dtype) for bias in biases]
    ys, s = kernel(x, weights, given, a, b, scales, dropout, seed)
    return list(ys), s


def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    ys = [x.new_empty(*x.shape[:-1], b_g.shape[0]) for b_g in b]
    return ys, x.new_empty(_tokens(x), sum(a_g.shape[0] for a_g in a))


def _tokens(x: Tensor) -> int:
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    return tokens


def _backward(
    dys: list[Tensor],
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    kernel = dispatch("lora_linear_backward", x.device, backend, x.dtype)
    weights = parts_in(weights, x.dtype)
    dx, da, db, dbias = kernel(dys, x, s, weights, a, b, scales, dropout, seed, need_dx, need_dbias)
    return dx, list(da), list(db), [grad.to(accumulate_dtype(x.dtype)) for grad in dbias]


def _backward_fake(
    dys: list[Tensor],
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    sums = accumulate_dtype(x.dtype)
    dx = x.new_empty(x.shape) if need_dx else empty(x)
    da = [a_g.new_empty(a_g.shape) for a_g in a]
    db = [b_g.new_empty(b_g.shape) for b_g in b]
    dbias = [x.new_empty(b_g.shape[0] if need else 0, dtype=sums) for b_g, need in zip(b, need_dbias, strict=True)]
    return dx, da, db, dbias


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, weights, biases, a, b, ctx.scales, ctx.dropout, seed, ctx.backend = inputs
    ctx.groups, ctx.parts = len(a), len(weights)
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.save_for_backward(x, output[1], seed, *weights, *a, *b)
    ctx.set_materialize_grads(False)  # no zeros for s, which has no gradient


def _gradients(ctx: Any, needs: Sequence[Any], dys: list[Tensor | None], _: Any) -> tuple[Any, ...]:
    x, s, seed, *rest = ctx.saved_tensors
    weights, adapters = rest[: ctx.parts], rest[ctx.parts :]
    a, b = adapters[: ctx.groups], adapters[ctx.groups :]
    need_dx, _, need_dbias, need_da, need_db, *_ = needs
    dys = [x.new_zeros(*x.shape[:-1], b_g.shape[0]) if dy is None else dy for dy, b_g in zip(dys, b, strict=True)]
    dx, da, db, dbias = torch.ops.petl.lora_linear_backward(
        dys, x, s, weights, a, b, ctx.scales, ctx.dropout, seed, need_dx, need_dbias, ctx.backend
    )
    dbias = [grad.to(dtype) for grad, dtype in zip(dbias, ctx.bias_dtypes, strict=True)]
    wanted = [_only(need_dbias, dbias), _only(need_da, da), _only(need_db, db)]
    return dx if need_dx else None, [None] * ctx.parts, *wanted, None, None, None, None


def _only(needs: list[bool], grads: list[Tensor]) -> list[Tensor | None]:
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


define(
    "lora_linear",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] b, float[] scales, float dropout,"
    " Tensor? seed, str backend) -> (Tensor[], Tensor)",
    _forward,
    _forward_fake,
    autocast=(0,),
)
define(
    "lora_linear_backward",
    "(Tensor[] dys, Tensor x, Tensor s, Tensor[] weights, Tensor[] a, Tensor[] b, float[] scales, float dropout,"
    " Tensor? seed, bool need_dx, bool[] need_dbias, str backend) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)
differentiate("lora_linear", _save, _gradients)
