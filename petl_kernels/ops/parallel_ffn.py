"""A frozen feed-forward network and a parallel adapter with its activation, as one network with more hidden units.

    y     = act(x W1ᵀ + c1) W2ᵀ + c2 + scale · (act(x Dᵀ + d) Uᵀ + u)
          = act(x [W1; D]ᵀ + [c1, d]) [W2 | scale·U]ᵀ + (c2 + scale · u)

    dx    = (dy [W2 | scale·U] ⊙ act'(z)) [W1; D]                   z all the pre-activations
    dU    = scale · dyᵀ act(z_D)        du = scale · Σ_tokens dy    z_D = x Dᵀ + d
    dD    = dz_Dᵀ x                     dd = Σ_tokens dz_D          dz_D = scale · (dy U) ⊙ act'(z_D)

so the adapter costs y and dx no pass of their own: they are those of ``frozen_ffn`` for m/f more hidden units. The sums
over tokens are those of ``bottleneck_adapter``, with z_D and dz_D made again.

x and y (..., d), W1 (f, d), W2 (d, f), D (m, d), U (d, m); act as in ``frozen_ffn``, without a gate. The network comes
with room for p = ``room(m)`` hidden units, m rounded up so that rows begin at whole 16 bytes: W1 (f + p, d),
c1 (f + p,), W2 (d, f + p). The room is written in every call, so backward comes before a call with other values, such
as another adapter's, in the same room; hidden units beyond m are zeros, and add nothing to y or dx. x and the weights
of one dtype, dense; the trained tensors may be wider, and are rounded to the weights' dtype, scale · U as well.

Saves: x (2d bytes per token in bf16) where the adapter has gradients, and where x has one what ``frozen_ffn`` keeps:
    ReLU                        ceil((f + p) / 8): whether each z > 0
    otherwise                   z (2(f + p) in bf16)
    ``recompute=True``          nothing more than x; backward makes z again, one product more
Source: He et al., arXiv 2110.04366 (parallel adapters); the sum of two such networks is one with both's hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch
from petl_kernels.errors import InputError
from petl_kernels.ops.activation import check_kind
from petl_kernels.ops.checks import check_activation, check_frozen, check_parameter, check_weight, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.frozen_ffn import empty_kept, what_to_keep
from petl_kernels.ops.quantized.tensor import QuantizedTensor

ALIGNMENT = 8  # hidden units: 16 bytes of a 16-bit row


def room(m: int) -> int:
    """Returns how many hidden units wider the weights of ``parallel_ffn`` are for an adapter of bottleneck m."""
    return -(-m // ALIGNMENT) * ALIGNMENT


def with_room(w1: Tensor, c1: Tensor | None, w2: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns copies of w1 (f, d), c1 (f,) and w2 (d, f) with zeros for ``room(m)`` more hidden units."""
    p = room(m)
    c1 = w1.new_zeros(w1.shape[0]) if c1 is None else c1
    return F.pad(w1, (0, 0, 0, p)), F.pad(c1, (0, p)), F.pad(w2, (0, p))


def parallel_ffn(
    x: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str = "relu",
    scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """Returns y = act(x W1ᵀ + c1) W2ᵀ + c2 + scale · (act(x Dᵀ + d) Uᵀ + u); x (..., d) -> (..., d).

    w1 (f + p, d), c1 (f + p,) and w2 (d, f + p) of ``with_room`` are frozen; their p = ``room(m)`` last hidden
    units are overwritten. c2 (d,), frozen, or None. down (m, d), down_bias (m,) or None, up (d, m), up_bias (d,)
    or None.
    Raises InputError: x of rank 0, shapes that do not fit, devices or dtypes that differ, a weight or bias of the base
    that requires grad, a quantized weight, an unknown activation.
    """
    _check(x, w1, c1, w2, c2, down, down_bias, up, up_bias, activation)
    c2 = fill(w1, c1, w2, c2, down, down_bias, up, up_bias, scale)
    trained = (down, down_bias, up, up_bias)
    keeps = "nothing"
    if torch.is_grad_enabled() and x.requires_grad:
        keeps = what_to_keep(activation, False, recompute)
    return torch.ops.petl.parallel_ffn(x, w1, c1, w2, c2, *trained, activation, float(scale), keeps, active())[0]


def _check(
    x: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> None:
    op = "parallel_ffn"
    check_activation(op, x)
    check_weight(op, "w1", w1, x)
    d, wide = x.shape[-1], w1.shape[0]
    if tuple(w2.shape) != (d, wide):
        raise InputError(f"{op}: w2 has shape {shape(w2)}: expected {(d, wide)}")
    check_frozen(op, "w2", w2, x)
    for name, weight in (("w1", w1), ("w2", w2)):
        if isinstance(weight, QuantizedTensor):
            raise InputError(f"{op}: {name} is quantized ({weight.storage}): expected a dense weight")
    if down.dim() != 2 or room(down.shape[0]) > wide:
        raise InputError(f"{op}: down has shape {shape(down)}: expected (m, {d}) with room for m in w1 {shape(w1)}")
    m = down.shape[0]
    expected = {
        "c1": (c1, (wide,)),
        "c2": (c2, (d,)),
        "down": (down, (m, d)),
        "down_bias": (down_bias, (m,)),
        "up": (up, (d, m)),
        "up_bias": (up_bias, (d,)),
    }
    for name, (parameter, size) in expected.items():
        if parameter is not None:
            check_parameter(op, name, parameter, size, x)
            if name in ("c1", "c2") and parameter.requires_grad:
                raise InputError(f"{op}: {name} requires grad: expected a frozen bias")
    check_kind(op, activation)


@torch.no_grad()
def fill(
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float,
) -> Tensor | None:
    """Writes the adapter into the room; returns c2 + scale · u.

    The writes go through ``.data``, which autograd does not count as changes: the values of a step do not change
    between forward and backward, and a second forward pass before the first one's backward writes the same ones. So
    each adapter needs a room of its own.
    """
    m = down.shape[0]
    f = w1.shape[0] - room(m)
    w1.data[f : f + m].copy_(down)
    c1.data[f : f + m] = 0 if down_bias is None else down_bias
    torch.mul(up, scale, out=w2.data[:, f : f + m])
    if room(m) > m:  # a larger adapter may have been here, and 0 · inf is no 0
        w1.data[f + m :], c1.data[f + m :], w2.data[:, f + m :] = 0, 0, 0
    if up_bias is None:
        return c2
    total = w2.new_empty(up_bias.shape)
    return torch.mul(up_bias, scale, out=total) if c2 is None else torch.add(c2, up_bias, alpha=scale, out=total)


def _forward(
    x: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    keeps: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = dispatch("frozen_ffn", x.device, backend, x.dtype)
    w1, c1, w2 = (part.to(x.dtype) for part in (w1, c1, w2))
    c2 = None if c2 is None else c2.to(x.dtype)
    return kernel(x, [w1], c1, [w2], c2, [], activation, keeps)[:2]


def _forward_fake(
    x: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    keeps: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(x.numel() // x.shape[-1], x.shape[-1])
    return x.new_empty(x.shape), empty_kept(rows, w1.shape[0], False, keeps)[0]


def _backward(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    activation: str,
    scale: float,
    keeps: str,
    need_dx: bool,
    need_adapter: bool,
    has_up_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dx = empty(dy)
    if need_dx:
        kernel = dispatch("frozen_ffn_backward", dy.device, backend, dy.dtype)
        given = x if keeps == "x" else None
        w1, c1, w2 = (part.to(dy.dtype) for part in (w1, c1, w2))
        dx, _, _ = kernel(dy, given, kept, empty(dy), [w1], c1, [w2], [], activation, keeps, True, False, False)
    if not need_adapter:
        return dx, *(empty(dy) for _ in range(4))
    kernel = dispatch("bottleneck_adapter_backward", dy.device, backend, dy.dtype)
    norm = None, None
    _, _, _, *grads = kernel(dy, x, False, *norm, down, down_bias, up, 0.0, activation, scale, False, has_up_bias)
    dtypes = _gradient_dtypes(dy, down, down_bias, up)
    return dx, *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    activation: str,
    scale: float,
    keeps: str,
    need_dx: bool,
    need_adapter: bool,
    has_up_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dx = dy.new_empty(dy.shape) if need_dx else empty(dy)
    if not need_adapter:
        return dx, *(empty(dy) for _ in range(4))
    dtypes = _gradient_dtypes(dy, down, down_bias, up)
    m, d = down.shape
    sizes = (m, d), (0 if down_bias is None else m,), (d, m), (d if has_up_bias else 0,)
    return dx, *(dy.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True))


def _gradient_dtypes(dy: Tensor, down: Tensor, down_bias: Tensor | None, up: Tensor) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of dD, dd, dU and du; the autograd rule casts du to that of u."""
    sums = accumulate_dtype(dy.dtype)
    return down.dtype, sums if down_bias is None else down_bias.dtype, up.dtype, sums


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, w1, c1, w2, _, down, down_bias, up, up_bias, ctx.activation, ctx.scale, ctx.keeps, ctx.backend = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # no zeros for the output that has no gradient
    ctx.trains = any(p is not None and p.requires_grad for p in (down, down_bias, up, up_bias))
    ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
    ctx.save_for_backward(x if ctx.trains or ctx.keeps == "x" else None, kept, w1, c1, w2, down, down_bias, up)


def _gradients(ctx: Any, needs: Sequence[Any], dy: Tensor | None, *others: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    x, kept, *parameters = ctx.saved_tensors
    has_up_bias = ctx.up_bias_dtype is not None
    dx, ddown, ddown_bias, dup, dup_bias = torch.ops.petl.parallel_ffn_backward(
        dy, x, kept, *parameters, ctx.activation, ctx.scale, ctx.keeps, needs[0], ctx.trains, has_up_bias, ctx.backend
    )
    if has_up_bias:
        dup_bias = dup_bias.to(ctx.up_bias_dtype)
    grads = (dx, None, None, None, None, ddown, ddown_bias, dup, dup_bias)
    return *(grad if need else None for grad, need in zip(grads, needs[:9], strict=True)), None, None, None, None


define(
    "parallel_ffn",
    "(Tensor x, Tensor w1, Tensor c1, Tensor w2, Tensor? c2, Tensor down, Tensor? down_bias, Tensor up,"
    " Tensor? up_bias, str activation, float scale, str keeps, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    autocast=(0,),
)
define(
    "parallel_ffn_backward",
    "(Tensor dy, Tensor? x, Tensor kept, Tensor w1, Tensor c1, Tensor w2, Tensor down, Tensor? down_bias, Tensor up,"
    " str activation, float scale, str keeps, bool need_dx, bool need_adapter, bool has_up_bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("parallel_ffn", _save, _gradients)
