"""A feed-forward network whose weights are frozen, gated or not.

    z     = x W1ᵀ + c1                  g = x Wgᵀ                   (with a gate)
    h     = act(z)                      h = act(z) ⊙ g              (with a gate)
    y     = h W2ᵀ + c2

    dh    = dy W2
    dz    = dh ⊙ act'(z)                dz = dh ⊙ g ⊙ act'(z),  dg = dh ⊙ act(z)
    dx    = dz W1                       dx = dz W1 + dg Wg
    dc1   = Σ_tokens dz                 dc2 = Σ_tokens dy           (fp32 sums, in the bias' dtype)

x and y (..., d), W1 and Wg (f, d), W2 (d, f), c1 (f,) and c2 (d,) or None; act is "relu", "gelu" (erf), "gelu_tanh"
or "silu". x and the weights of one dtype (bf16, fp16, fp32, fp64), biases of any; act and its derivative are fp32
(fp64 for fp64). Each weight may be quantized (``ops/quantized``): its products are then those of that file.

Saves: in bytes per token, where x or c1 has a gradient (nothing where not):
    ReLU without a gate         ceil(f / 8): whether each z > 0 (``ops/bits.py``), which is its derivative
    otherwise                   z, and g with a gate, in x's dtype (2f or 4f in bf16)
    ``recompute=True``          x (2d in bf16), nothing where x is kept anyway; backward forms z and g again, which
                                adds a product (two with a gate) to the two (three) that it has
Forward and backward go through the tokens in chunks whose hidden values take about 8 MB (64 in Triton), so no larger
(tokens, f) tensor exists beside the saved one.
Source: the derivative of two matrix products with dW left out; gated form: Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.activation import ACTIVATIONS, check_kind, derivative
from petl_kernels.ops.bits import pack_bits, packed_width, unpack_bits
from petl_kernels.ops.checks import check_activation, check_frozen, check_parameter, check_weight, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.quantized.products import project, project_back
from petl_kernels.ops.quantized.storage import out_features, parts_in
from petl_kernels.ops.quantized.tensor import parts_of

CHUNK_BYTES = 8 << 20
CHUNK_ROWS = 256
# On CUDA 8,192 rows of f = 4096 exist as a whole, so that a step of so many tokens has no chunks.
CUDA_CHUNK_BYTES = 64 << 20


def frozen_ffn(
    x: Tensor,
    w1: Tensor,
    c1: Tensor | None,
    w2: Tensor,
    c2: Tensor | None,
    gate: Tensor | None = None,
    activation: str = "relu",
    recompute: bool = False,
) -> Tensor:
    """Returns y = (act(x W1ᵀ + c1) [⊙ x Wgᵀ]) W2ᵀ + c2; x (..., d) -> (..., d).

    w1 (f, d), w2 (d, f) and gate (f, d) are frozen; the biases may be trained. Raises InputError: x of rank 0, shapes
    that do not fit, devices or dtypes that differ, a weight that requires grad, an unknown activation.
    """
    _check(x, w1, c1, w2, c2, gate, activation)
    inner = torch.is_grad_enabled() and (x.requires_grad or (c1 is not None and c1.requires_grad))
    keeps = what_to_keep(activation, gate is not None, recompute) if inner else "nothing"
    gates = [] if gate is None else parts_of(gate)
    return torch.ops.petl.frozen_ffn(x, parts_of(w1), c1, parts_of(w2), c2, gates, activation, keeps, active())[0]


def what_to_keep(activation: str, gated: bool, recompute: bool) -> str:
    """Returns what forward keeps for dx and dc1 where they are needed: "x", "bits" (one for each z) or "z" (and g)."""
    if recompute:
        return "x"
    return "bits" if activation == "relu" and not gated else "z"


def _check(
    x: Tensor, w1: Tensor, c1: Tensor | None, w2: Tensor, c2: Tensor | None, gate: Tensor | None, activation: str
) -> None:
    op = "frozen_ffn"
    check_activation(op, x)
    check_weight(op, "w1", w1, x)
    f, d = w1.shape
    for name, weight, expected in (("w2", w2, (d, f)), ("gate", gate, (f, d))):
        if weight is not None:
            if tuple(weight.shape) != expected:
                raise InputError(f"{op}: {name} has shape {shape(weight)}: expected {expected}")
            check_frozen(op, name, weight, x)
    for name, bias, size in (("c1", c1, f), ("c2", c2, d)):
        if bias is not None:
            check_parameter(op, name, bias, (size,), x)
    check_kind(op, activation)


def chunk_rows(rows: int, hidden: int, itemsize: int, device: str = "cpu") -> int:
    """Returns the rows of a chunk: about CHUNK_BYTES of hidden values, at least CHUNK_ROWS, chunks of equal length."""
    most = max(CHUNK_ROWS, (CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES) // max(1, hidden * itemsize))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def chunks_of(x: Tensor, hidden: int) -> Iterator[slice]:
    """Yields the rows of x (tokens, ...) in chunks."""
    rows = x.shape[0]
    size = chunk_rows(rows, hidden, x.element_size())
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


@register("frozen_ffn", "reference")
def reference(
    x: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    c2: Tensor | None,
    gate: list[Tensor],
    activation: str,
    keeps: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    y, hidden = rows.new_empty(rows.shape), out_features(w1, x.shape[-1])
    kept_z, kept_g = empty_kept(rows, hidden, bool(gate), keeps)
    for part in chunks_of(rows, hidden):
        z, g = _project(rows[part], w1, c1, gate)
        if keeps == "bits":
            kept_z[part] = pack_bits(z > 0)
        elif keeps == "z":
            kept_z[part] = z
            if g is not None:
                kept_g[part] = g
        y[part] = project(_activate(z, g, activation), w2, c2, "reference")
    return y.view(x.shape), kept_z, kept_g


@register("frozen_ffn_backward", "reference")
def reference_backward(
    dy: Tensor,
    x: Tensor | None,
    kept_z: Tensor,
    kept_g: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    gate: list[Tensor],
    activation: str,
    keeps: str,
    need_dx: bool,
    need_dc1: bool,
    need_dc2: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = accumulate_dtype(dy.dtype)
    rows = dy.reshape(-1, dy.shape[-1])
    x_rows = x.reshape(rows.shape) if x is not None and keeps == "x" else None
    dx = rows.new_empty(rows.shape) if need_dx else empty(dy)
    hidden = out_features(w1, dy.shape[-1])
    dc1 = dy.new_zeros(hidden if need_dc1 else 0, dtype=sums)
    for part in chunks_of(rows, hidden) if need_dx or need_dc1 else ():
        dh = project_back(rows[part], w2, "reference").to(sums)
        if keeps == "bits":
            dz, dg = dh * unpack_bits(kept_z[part], hidden), None
        else:
            z, g = (kept_z[part], kept_g[part]) if x_rows is None else _project(x_rows[part], w1, c1, gate)
            dz, dg = _activate_backward(dh, z.to(sums), g.to(sums) if gate and g is not None else None, activation)
        if need_dc1:
            dc1 += dz.sum(0)
        if need_dx:
            dx[part] = project_back(dz.to(dy.dtype), w1, "reference")
            if dg is not None:
                dx[part] += project_back(dg.to(dy.dtype), gate, "reference")
    dc2 = rows.sum(0, dtype=sums) if need_dc2 else dy.new_empty(0, dtype=sums)
    return dx.view(dy.shape if need_dx else (0,)), dc1, dc2


def empty_kept(rows: Tensor, hidden: int, gated: bool, keeps: str) -> tuple[Tensor, Tensor]:
    """Returns empty tensors for the values that forward keeps beside its input: the bits or z, and g."""
    tokens = rows.shape[0]
    if keeps == "bits":
        return rows.new_empty(tokens, packed_width(hidden), dtype=torch.uint8), empty(rows)
    z = rows.new_empty(tokens, hidden) if keeps == "z" else empty(rows)
    return z, rows.new_empty(tokens, hidden) if keeps == "z" and gated else empty(rows)


def _project(x: Tensor, w1: list[Tensor], c1: Tensor | None, gate: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return project(x, w1, c1, "reference"), project(x, gate, None, "reference") if gate else None


def _activate(z: Tensor, g: Tensor | None, activation: str) -> Tensor:
    h = ACTIVATIONS[activation](z.to(accumulate_dtype(z.dtype)))
    return (h if g is None else h * g).to(z.dtype)


def _activate_backward(dh: Tensor, z: Tensor, g: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    dz = dh * derivative(activation, z)
    return (dz, None) if g is None else (dz * g, dh * ACTIVATIONS[activation](z))


def _forward(
    x: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    c2: Tensor | None,
    gate: list[Tensor],
    activation: str,
    keeps: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = dispatch("frozen_ffn", x.device, backend, x.dtype)
    w1, w2, gate = (parts_in(weight, x.dtype) for weight in (w1, w2, gate))
    c1, c2 = (None if bias is None else bias.to(x.dtype) for bias in (c1, c2))
    return kernel(x, w1, c1, w2, c2, gate, activation, keeps)


def _forward_fake(
    x: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    c2: Tensor | None,
    gate: list[Tensor],
    activation: str,
    keeps: str,
    backend: str,
) -> tuple[Tensor, ...]:
    rows = x.new_empty(x.numel() // x.shape[-1], x.shape[-1])
    return x.new_empty(x.shape), *empty_kept(rows, out_features(w1, x.shape[-1]), bool(gate), keeps)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    kept_z: Tensor,
    kept_g: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    gate: list[Tensor],
    activation: str,
    keeps: str,
    need_dx: bool,
    need_dc1: bool,
    need_dc2: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = dispatch("frozen_ffn_backward", dy.device, backend, dy.dtype)
    w1, w2, gate = (parts_in(weight, dy.dtype) for weight in (w1, w2, gate))
    c1 = None if c1 is None else c1.to(dy.dtype)
    return kernel(dy, x, kept_z, kept_g, w1, c1, w2, gate, activation, keeps, need_dx, need_dc1, need_dc2)


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    kept_z: Tensor,
    kept_g: Tensor,
    w1: list[Tensor],
    c1: Tensor | None,
    w2: list[Tensor],
    gate: list[Tensor],
    activation: str,
    keeps: str,
    need_dx: bool,
    need_dc1: bool,
    need_dc2: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = accumulate_dtype(dy.dtype)
    dx = dy.new_empty(dy.shape) if need_dx else empty(dy)
    dc1 = dy.new_empty(out_features(w1, dy.shape[-1]) if need_dc1 else 0, dtype=sums)
    return dx, dc1, dy.new_empty(dy.shape[-1] if need_dc2 else 0, dtype=sums)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, w1, c1, w2, c2, gate, ctx.activation, ctx.keeps, ctx.backend = inputs
    _, kept_z, kept_g = output
    ctx.mark_non_differentiable(kept_z, kept_g)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    ctx.save_for_backward(x if ctx.keeps == "x" else None, kept_z, kept_g, c1, *w1, *w2, *gate)
    ctx.parts = len(w1), len(w2), len(gate)
    ctx.c2_dtype = None if c2 is None else c2.dtype


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor | None, *others: Any) -> tuple[Any, ...]:
    first, second, _ = ctx.parts
    none = [[None] * size for size in ctx.parts]
    if dy is None:
        return None, none[0], None, none[1], None, none[2], *(None,) * 3
    x, kept_z, kept_g, c1, *weights = ctx.saved_tensors
    w1, w2, gate = weights[:first], weights[first : first + second], weights[first + second :]
    need_dx, _, need_dc1, _, need_dc2, *_ = needs
    dx, dc1, dc2 = torch.ops.petl.frozen_ffn_backward(
        dy, x, kept_z, kept_g, w1, c1, w2, gate, ctx.activation, ctx.keeps, need_dx, need_dc1, need_dc2, ctx.backend
    )
    return (
        dx if need_dx else None,
        none[0],
        dc1.to(c1.dtype) if need_dc1 else None,
        none[1],
        dc2.to(ctx.c2_dtype) if need_dc2 else None,
        none[2],
        *(None,) * 3,
    )


define(
    "frozen_ffn",
    "(Tensor x, Tensor[] w1, Tensor? c1, Tensor[] w2, Tensor? c2, Tensor[] gate, str activation, str keeps,"
    " str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    autocast=(0,),
)
define(
    "frozen_ffn_backward",
    "(Tensor dy, Tensor? x, Tensor kept_z, Tensor kept_g, Tensor[] w1, Tensor? c1, Tensor[] w2, Tensor[] gate,"
    " str activation, str keeps, bool need_dx, bool need_dc1, bool need_dc2, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("frozen_ffn", _save, _gradients)
