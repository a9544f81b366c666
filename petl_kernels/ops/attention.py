"""Scaled dot-product attention, with trained prefixes, a relative position bias and dropout on its probabilities.

    S     = scale · q kᵀ + bias + mask           one row a query; -inf where the mask, or causality, hides a key
    lse   = log Σ_keys exp(S)                    of the prefix and the keys together
    P     = exp(S - lse)
    o     = drop(P) v

    delta = Σ_features do ⊙ o
    dv    = drop(P)ᵀ do
    dS    = P ⊙ (drop(do vᵀ) - delta)
    dq    = scale · dS k         dk = scale · dSᵀ q          dbias = dS, summed over what bias is broadcast over

A prefix (P, H, D) stands in front of the keys: every query of every batch row sees it, without mask and bias. It is
never concatenated with them. Where a kernel treats the two apart, o = Σ_part exp(lse_part - lse) · o_part, and each
part is differentiated with the lse and the delta of the whole, so that the two dq add up. dprefix_k and dprefix_v are
dk and dv of the prefix, summed over the batch in fp32.

q (B, H, Lq, D), k and v (B, H, Lk, D) of any strides; o (B, H, Lq, D) over memory of shape (B, Lq, H, D). mask
(B or 1, H or 1, Lq or 1, Lk): bool, True where a query may see a key, or additive. bias (B or 1, H, Lq, Lk). causal:
query i sees keys up to i + Lk - Lq. q, k and v are bf16, fp16, fp32 or fp64; products are in that dtype, scores,
softmax and sums in fp32 (fp64 for fp64). mask, bias and prefix may have other dtypes. A query that sees nothing gets
o = 0 and no gradient; its lse is +inf, so that exp(S - lse) is 0 there as well.

Dropout is that of ``philox`` over the contiguous (B, H, Lq, P + Lk) probabilities; backward draws the mask again.

Saves: q, k, v and o (8HD bytes per token in bf16, where Lq = Lk) and lse (4H). mask, bias, prefix and seed as given.
Source: Dao, arXiv 2307.08691 (lse, delta); Li and Liang, arXiv 2101.00190 (prefixes); Raffel et al., arXiv 1910.10683
(relative position bias).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from petl_kernels.backends import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.common import (
    accumulate_dtype,
    autocasts,
    check_device,
    define,
    differentiate,
    empty,
    shape,
)

CHUNK_BYTES = 16 * 2**20


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v; q (B, H, Lq, D), k and v (B, H, Lk, D) -> (B, H, Lq, D).

    scale is D^-0.5 by default. The result's memory is (B, Lq, H, D): ``o.transpose(1, 2).reshape(B, Lq, H * D)`` is a
    view. seed: int64 tensor of shape (1,) on q's device, drawn with ``torch.randint`` when dropout > 0 and none is
    given. Raises InputError: shapes, dtypes or devices that do not fit, a mask that requires grad, one half of a
    prefix, dropout outside [0, 1) or over 2^32 probabilities.
    """
    _check(q, k, v, mask, bias, dropout, seed, prefix_k, prefix_v)
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = philox.draw_seed(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, _ = torch.ops.petl.attention(
        q, k, v, mask, bias, prefix_k, prefix_v, bool(causal), scale, float(dropout), seed, active()
    )
    return o


def _check(q, k, v, mask, bias, dropout, seed, prefix_k, prefix_v) -> None:
    op = "attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise InputError(f"{op}: {name} has shape {shape(tensor)}: expected (batch, heads, length, features)")
        if not tensor.is_floating_point():
            raise InputError(f"{op}: {name} has dtype {tensor.dtype}: expected a floating-point tensor")
        if tensor.dtype != q.dtype and not autocasts(q):
            raise InputError(f"{op}: {name} has dtype {tensor.dtype}: expected that of q, {q.dtype}")
        check_device(op, name, tensor, q)
    batch, heads, queries, features = q.shape
    keys = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (batch, heads, keys, features):
            raise InputError(f"{op}: {name} has shape {shape(tensor)}: expected {(batch, heads, keys, features)}")
    if features == 0:
        raise InputError(f"{op}: q has shape {shape(q)}: expected one feature or more")
    if mask is not None:
        _check_broadcast("mask", mask, ((batch, 1), (heads, 1), (queries, 1), (keys,)), q)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"{op}: mask has dtype {mask.dtype}: expected torch.bool or a floating-point dtype")
        if mask.requires_grad:
            raise InputError(f"{op}: mask requires grad: expected a constant (a trained bias goes into bias)")
    if bias is not None:
        _check_broadcast("bias", bias, ((batch, 1), (heads,), (queries,), (keys,)), q)
        if not bias.is_floating_point():
            raise InputError(f"{op}: bias has dtype {bias.dtype}: expected a floating-point tensor")
    prefix = _check_prefix(prefix_k, prefix_v, q)
    if not 0 <= dropout < 1:
        raise InputError(f"{op}: dropout is {dropout}: expected a number in [0, 1)")
    probabilities = batch * heads * queries * (prefix + keys)
    if dropout and probabilities >= philox.MAX_ELEMENTS:
        raise InputError(f"{op}: there are {probabilities} probabilities: expected fewer than 2^32 with dropout")
    if seed is not None:
        if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
            raise InputError(f"{op}: seed is {seed.dtype} of shape {shape(seed)}: expected int64 of shape (1,)")
        check_device(op, "seed", seed, q)


def _check_broadcast(name: str, tensor: Tensor, allowed: tuple[tuple[int, ...], ...], q: Tensor) -> None:
    fits = tensor.dim() == 4 and all(size in sizes for size, sizes in zip(tensor.shape, allowed, strict=True))
    if not fits:
        expected = ", ".join(" or ".join(str(size) for size in sizes) for sizes in allowed)
        raise InputError(f"attention: {name} has shape {shape(tensor)}: expected ({expected})")
    check_device("attention", name, tensor, q)


def _check_prefix(prefix_k: Tensor | None, prefix_v: Tensor | None, q: Tensor) -> int:
    """The length of the prefix."""
    if (prefix_k is None) != (prefix_v is None):
        missing = "prefix_k" if prefix_k is None else "prefix_v"
        raise InputError(f"attention: {missing} is None and the other half is not: expected both or none")
    if prefix_k is None:
        return 0
    _, heads, _, features = q.shape
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dim() != 3 or tuple(tensor.shape) != (prefix_k.shape[0], heads, features):
            length = prefix_k.shape[0] if name == "prefix_v" else "prefix"
            raise InputError(f"attention: {name} has shape {shape(tensor)}: expected ({length}, {heads}, {features})")
        if not tensor.is_floating_point():
            raise InputError(f"attention: {name} has dtype {tensor.dtype}: expected a floating-point tensor")
        check_device("attention", name, tensor, q)
    return prefix_k.shape[0]


def transient_chunks(batch: int, heads: int, queries: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of (batch, heads, queries), each a contiguous run of the probabilities (batch, heads, queries, columns).

    A run has at most CHUNK_BYTES of fp32, but one row at least.
    """
    rows = max(1, CHUNK_BYTES // (4 * max(1, columns)))
    query_step = min(max(1, queries), rows)
    head_step = min(max(1, heads), rows // query_step) if query_step >= queries else 1
    batch_step = max(1, rows // (query_step * head_step)) if head_step == heads else 1
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for i in range(0, queries, query_step):
                yield (
                    slice(b, min(b + batch_step, batch)),
                    slice(h, min(h + head_step, heads)),
                    slice(i, min(i + query_step, queries)),
                )


@register("attention", "reference")
def reference(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed)
    o, lse = _outputs(q)
    for part in inputs.chunks():
        s = inputs.scores(part)
        p, lse[part] = _softmax(s)
        o[part] = inputs.weighted_values(part, (p * inputs.kept(part)).to(q.dtype))
    return o, lse


@register("attention_backward", "reference")
def reference_backward(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = accumulate_dtype(q.dtype)
    inputs = _Inputs(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed)
    prefix = inputs.prefix
    dq, dk, dv = (_like_heads(tensor) for tensor in (q, k, v))
    dbias = bias.new_zeros(bias.shape, dtype=sums) if need_dbias else empty(q)
    dprefix_k, dprefix_v = (q.new_zeros(_heads_first(p).shape, dtype=sums) for p in (inputs.prefix_k, inputs.prefix_v))
    dk_sum = dv_sum = None
    for part in inputs.chunks():
        b, h, rows = part
        # A row is whole here, so its softmax is taken again: unlike exp(S - lse) it survives an additive mask that
        # hides all keys with finfo.min, in whose lse the logarithm of the sum is lost.
        p, _ = _softmax(inputs.scores(part))
        kept = inputs.kept(part)
        do_part = do[part]
        delta = (do_part.to(sums) * o[part].to(sums)).sum(-1, keepdim=True)
        ds = p * (inputs.against_values(part, do_part) * kept - delta)
        if need_dbias:
            dbias[b if bias.shape[0] > 1 else slice(0, 1), h, rows] += _sum_to(ds[..., prefix:], bias.shape[0])
        ds, p = (ds * scale).to(q.dtype), (p * kept).to(q.dtype)

        dq[part] = inputs.weighted_keys(part, ds)
        # The queries of a head may come in several chunks: sums over them are not rounded in between.
        if rows.start == 0:
            dk_sum, dv_sum = (k.new_zeros(k[b, h].shape, dtype=sums) for _ in range(2))
        dk_sum += ds[..., prefix:].mT @ q[part]
        dv_sum += p[..., prefix:].mT @ do_part
        if rows.stop == q.shape[2]:
            dk[b, h], dv[b, h] = dk_sum, dv_sum
        if prefix:
            dprefix_k[h] += _over_batch(ds[..., :prefix]).to(sums).mT @ _over_batch(q[part]).to(sums)
            dprefix_v[h] += _over_batch(p[..., :prefix]).to(sums).mT @ _over_batch(do_part).to(sums)
    if q.shape[2] == 0:
        dk.zero_(), dv.zero_()
    return dq, dk, dv, dbias, dprefix_k.transpose(0, 1).contiguous(), dprefix_v.transpose(0, 1).contiguous()


class _Inputs:
    """What the scores of a chunk of (batch, heads, queries) are made of."""

    def __init__(self, q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed):
        self.q, self.k, self.v, self.mask, self.bias = q, k, v, mask, bias
        self.causal, self.scale, self.dropout, self.seed = causal, scale, dropout, seed
        nothing = q.new_empty(0, q.shape[1], q.shape[3])
        self.prefix_k = nothing if prefix_k is None else prefix_k.to(q.dtype)
        self.prefix_v = nothing if prefix_v is None else prefix_v.to(q.dtype)
        self.prefix = self.prefix_k.shape[0]
        self.sums = accumulate_dtype(q.dtype)

    def chunks(self) -> Iterator[tuple[slice, slice, slice]]:
        return transient_chunks(*self.q.shape[:3], self.prefix + self.k.shape[2])

    def scores(self, part) -> Tensor:
        """S of one chunk: (batch, heads, queries, prefix + keys)."""
        b, h, rows = part
        q = self.q[part]
        s = (q @ self.k[b, h].mT).to(self.sums) * self.scale
        if self.bias is not None:
            s = s + _slice(self.bias, part).to(self.sums)
        if self.mask is not None:
            mask = _slice(self.mask, part)
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(self.sums)
        if self.causal:
            i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            j = torch.arange(self.k.shape[2], device=q.device)
            s = s.masked_fill(j > i + (self.k.shape[2] - self.q.shape[2]), -torch.inf)
        if not self.prefix:
            return s
        s_prefix = (q @ _heads_first(self.prefix_k)[h].mT).to(self.sums) * self.scale
        return torch.cat([s_prefix, s], -1)

    def weighted_values(self, part, p: Tensor) -> Tensor:
        """p v"""
        return self._weighted(part, p, self.v, self.prefix_v)

    def weighted_keys(self, part, ds: Tensor) -> Tensor:
        """ds k"""
        return self._weighted(part, ds, self.k, self.prefix_k)

    def _weighted(self, part, weights: Tensor, rows: Tensor, prefix: Tensor) -> Tensor:
        b, h, _ = part
        total = weights[..., self.prefix :] @ rows[b, h]
        return total + weights[..., : self.prefix] @ _heads_first(prefix)[h] if self.prefix else total

    def against_values(self, part, do: Tensor) -> Tensor:
        """do vᵀ"""
        b, h, _ = part
        dp = (do @ self.v[b, h].mT).to(self.sums)
        if not self.prefix:
            return dp
        return torch.cat([(do @ _heads_first(self.prefix_v)[h].mT).to(self.sums), dp], -1)

    def kept(self, part) -> Tensor | float:
        """0 where dropout drops a probability, 1 / (1 - p) where it keeps it."""
        if self.dropout == 0:
            return 1.0
        _, heads, queries, _ = self.q.shape
        columns = self.prefix + self.k.shape[2]
        b, h, rows = part
        size = (b.stop - b.start, h.stop - h.start, rows.stop - rows.start, columns)
        first = ((b.start * heads + h.start) * queries + rows.start) * columns
        return philox.keep_mask(self.seed, size, self.dropout, first).to(self.sums) / (1 - self.dropout)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """P and lse; a query that sees nothing has P = 0 and lse = inf."""
    lse = torch.logsumexp(s, -1)
    blind = lse == -torch.inf
    return s.softmax(-1).masked_fill(blind[..., None], 0), lse.masked_fill(blind, torch.inf)


def _slice(tensor: Tensor, part: tuple[slice, slice, slice]) -> Tensor:
    """The part of a mask or a bias, whose dimensions of size 1 are broadcast."""
    return tensor[tuple(s if size > 1 else slice(None) for s, size in zip(part, tensor.shape, strict=False))]


def _sum_to(ds: Tensor, batch: int) -> Tensor:
    return ds if batch > 1 else ds.sum(0, keepdim=True)


def _heads_first(prefix: Tensor) -> Tensor:
    """(P, H, D) as (H, P, D)"""
    return prefix.transpose(0, 1)


def _over_batch(rows: Tensor) -> Tensor:
    """(batch, heads, queries, n) as (heads, batch · queries, n): a sum over rows is one over the batch too."""
    return rows.transpose(0, 1).flatten(1, 2)


def _like_heads(x: Tensor) -> Tensor:
    """An empty (B, H, L, D) over memory of shape (B, L, H, D)."""
    batch, heads, length, features = x.shape
    return x.new_empty(batch, length, heads, features).transpose(1, 2)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _forward(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, backend):
    kernel = dispatch("attention", q.device, backend, q.dtype)
    return kernel(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed)


def _forward_fake(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, backend):
    return _outputs(q)


def _backward(do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias, backend):
    kernel = dispatch("attention_backward", q.device, backend, q.dtype)
    dq, dk, dv, dbias, dprefix_k, dprefix_v = kernel(
        do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias
    )
    sums = accumulate_dtype(q.dtype)
    return dq, dk, dv, dbias.to(sums), dprefix_k.to(sums), dprefix_v.to(sums)


def _backward_fake(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias, backend
):
    sums = accumulate_dtype(q.dtype)
    prefix = (0, q.shape[1], q.shape[3]) if prefix_k is None else prefix_k.shape
    dbias = q.new_empty(bias.shape if need_dbias else 0, dtype=sums)
    return (*map(_like_heads, (q, k, v)), dbias, q.new_empty(prefix, dtype=sums), q.new_empty(prefix, dtype=sums))


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, bias, prefix_k, prefix_v, ctx.causal, ctx.scale, ctx.dropout, seed, ctx.backend = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, mask, bias, prefix_k, prefix_v, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx, needs, do: Tensor | None, _):
    if do is None:
        return (None,) * len(needs)
    q, k, v, o, lse, mask, bias, prefix_k, prefix_v, seed = ctx.saved_tensors
    dq, dk, dv, dbias, dprefix_k, dprefix_v = torch.ops.petl.attention_backward(
        do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v,
        ctx.causal, ctx.scale, ctx.dropout, seed, needs[4], ctx.backend,
    )  # fmt: skip
    dbias = dbias.to(bias.dtype) if needs[4] else None
    prefix = [
        grad.to(p.dtype) if need else None
        for grad, p, need in ((dprefix_k, prefix_k, needs[5]), (dprefix_v, prefix_v, needs[6]))
    ]
    dq, dk, dv = (grad if need else None for grad, need in zip((dq, dk, dv), needs[:3], strict=True))
    return dq, dk, dv, None, dbias, *prefix, None, None, None, None, None


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? prefix_k, Tensor? prefix_v, bool causal,"
    " float scale, float dropout, Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    autocast=(0, 1, 2),
)
define(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? mask, Tensor? bias, Tensor? prefix_k,"
    " Tensor? prefix_v, bool causal, float scale, float dropout, Tensor? seed, bool need_dbias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("attention", _save, _gradients)
