"""Attention with capped scores, whose keys and values several heads of queries share: Gemma's.

    x     = scale · q kᵀ                        of a head of queries, with the keys of its group
    s     = cap · tanh(x / cap) + mask          s = x + mask without a cap
    p     = softmax(s),  o = drop(p) v

    dv    = Σ drop(p)ᵀ do                       Σ over the heads of a group
    ds    = p ⊙ (drop'(do vᵀ) - rowsum(do ⊙ o))
    dx    = ds ⊙ (1 - tanh²(x / cap))
    dq    = scale · dx k,  dk = scale · Σ dxᵀ q

q (B, H, Lq, D), k and v (B, G, Lk, D) with H a multiple of G: the heads h of queries read those of h // (H / G). mask:
a number to add, (B or 1, 1, Lq or 1, Lk), or None; a window of positions is part of it. A prefix (P, G, D) stands
before k and v, and every query sees it. q, k and v are bf16, fp16, fp32 or fp64, products are in their dtype, and all
between them in fp32 (fp64 for fp64). A query to which a mask of -inf leaves no key gets NaN, as in PyTorch.

Scores are made group by group, and for some sentences and queries at a time: CHUNK_BYTES of them at most, but one query
of a group at least.

Saves: q, k, v and o, and for a prefix that. Never scores or probabilities: backward makes them again.
Source: Gemma 2 (arXiv 2408.00118); the backward is the derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.attention_checks import check_heads, check_prefix
from petl_kernels.ops.attention_reference import CHUNK_BYTES, like_heads
from petl_kernels.ops.checks import check_device, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty

OP = "capped_attention"


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    cap: float = 0.0,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
) -> Tensor:
    """Returns softmax(cap · tanh(scale · q kᵀ / cap) + mask) v, (B, H, Lq, D); a ``cap`` of 0 is none.

    scale is D^-0.5 by default. The result's memory is (B, Lq, H, D). seed: int64 tensor of shape (1,) on q's device,
    drawn when dropout > 0 and none is given.

    Raises InputError: shapes, dtypes or devices that do not fit, a mask that is no number to add, one half of a prefix,
    a cap below 0, dropout outside [0, 1) or over 2^32 probabilities.
    """
    _check(q, k, v, mask, cap, prefix_k, prefix_v)
    columns = k.shape[2] + (0 if prefix_k is None else prefix_k.shape[0])
    seed = philox.seed_for(OP, q[..., :1].expand(*q.shape[:3], columns), dropout, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    own = float(cap), scale, float(dropout), seed, active()
    return torch.ops.petl.capped_attention(q, k, v, mask, prefix_k, prefix_v, *own)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cap: float,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
) -> None:
    check_heads(OP, q, k, v)
    batch, heads, queries, features = q.shape
    groups, keys = k.shape[1:3]
    if tuple(k.shape) != (batch, groups, keys, features) or not groups or heads % groups:
        raise InputError(
            f"{OP}: k has shape {shape(k)}: expected ({batch}, a divisor of {heads}, length, {features}) for q of shape"
            f" {shape(q)}"
        )
    if v.shape != k.shape:
        raise InputError(f"{OP}: v has shape {shape(v)}: expected that of k, {shape(k)}")
    if mask is not None:
        sizes = ((batch, 1), (1,), (queries, 1), (keys,))
        fits = mask.dim() == 4 and all(n in allowed for n, allowed in zip(mask.shape, sizes, strict=True))
        if not fits or not mask.is_floating_point() or mask.requires_grad:
            raise InputError(
                f"{OP}: mask is {mask.dtype} of shape {shape(mask)}: expected constants to add, ({batch} or 1, 1, "
                f"{queries} or 1, {keys})"
            )
        check_device(OP, "mask", mask, q)
    check_prefix(OP, prefix_k, prefix_v, q, groups)
    if not cap >= 0:
        raise InputError(f"{OP}: cap is {cap}: expected a number above 0, or 0 for none")


@register(OP, "reference")
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cap: float,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    inputs = _Inputs(q, k, v, mask, prefix_k, prefix_v, cap, scale, dropout, seed)
    o = like_heads(q)
    for chunk in inputs.chunks():
        p = inputs.scores(chunk)[0].softmax(-1).mul_(inputs.kept(chunk))
        chunk.of_heads(o).copy_(_by_keys(p.to(q.dtype), inputs.values(chunk)))
    return o


@register(f"{OP}_backward", "reference")
def reference_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cap: float,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _Inputs(q, k, v, mask, prefix_k, prefix_v, cap, scale, dropout, seed)
    sums, prefix = inputs.sums, inputs.prefix
    dq, dk, dv = (like_heads(tensor) for tensor in (q, k, v))
    dprefix_k, dprefix_v = (
        empty(q) if own is None else q.new_zeros(own.shape, dtype=sums) for own in (prefix_k, prefix_v)
    )
    if q.shape[2] == 0:
        dk.zero_()
        dv.zero_()
    dk_sum, dv_sum = empty(q), empty(q)
    for chunk in inputs.chunks():
        s, slope = inputs.scores(chunk)
        p, kept = s.softmax(-1), inputs.kept(chunk)
        del s
        do_part, q_part = chunk.of_heads(do), chunk.of_heads(q)
        delta = (do_part.to(sums) * chunk.of_heads(o).to(sums)).sum(-1, keepdim=True)
        ds = _by_keys(do_part, inputs.values(chunk).mT).to(sums).mul_(kept).sub_(delta).mul_(p).mul_(scale)
        if slope is not None:
            ds.mul_(slope)
        ds, p = ds.to(q.dtype), p.mul_(kept).to(q.dtype)
        chunk.of_heads(dq).copy_(_by_keys(ds, inputs.keys(chunk)))
        # The queries of a group may come in several chunks: sums over them are not rounded in between.
        dk_part, dv_part = (_by_heads(own, rows).to(sums) for own, rows in ((ds, q_part), (p, do_part)))
        dk_sum, dv_sum = (dk_part, dv_part) if chunk.first else (dk_sum + dk_part, dv_sum + dv_part)
        if not chunk.last:
            continue
        dk[chunk.b, chunk.group], dv[chunk.b, chunk.group] = dk_sum[:, prefix:], dv_sum[:, prefix:]
        if prefix:
            dprefix_k[:, chunk.group] += dk_sum[:, :prefix].sum(0)
            dprefix_v[:, chunk.group] += dv_sum[:, :prefix].sum(0)
    return dq, dk, dv, dprefix_k, dprefix_v


class _Chunk(NamedTuple):
    """Some sentences and queries of the heads of one group."""

    b: slice
    group: int
    heads: slice
    rows: slice
    first: bool  # of the chunks that go over the queries of these sentences
    last: bool

    def of_heads(self, tensor: Tensor) -> Tensor:
        """Returns the chunk's part of ``tensor`` (batch, heads, queries, features)."""
        return tensor[self.b, self.heads, self.rows]


class _Inputs:
    """The inputs of an attention, and the scores of their chunks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        cap: float,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ):
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.prefix_k, self.prefix_v = prefix_k, prefix_v
        self.cap, self.scale, self.dropout, self.seed = cap, scale, dropout, seed
        self.sums, self.prefix = accumulate_dtype(q.dtype), 0 if prefix_k is None else prefix_k.shape[0]
        self.columns = self.prefix + k.shape[2]

    def chunks(self) -> Iterator[_Chunk]:
        batch, heads, queries, _ = self.q.shape
        shared = heads // self.k.shape[1]
        for b, rows in chunk_slices(batch, shared, queries, self.columns):
            for group in range(self.k.shape[1]):
                own = slice(group * shared, (group + 1) * shared)
                for part in rows:
                    yield _Chunk(b, group, own, part, part.start == 0, part.stop >= queries)

    def keys(self, chunk: _Chunk) -> Tensor:
        """Returns the keys of a chunk, (batch, columns, features)."""
        return _with_prefix(self.k[chunk.b, chunk.group], self.prefix_k, chunk.group)

    def values(self, chunk: _Chunk) -> Tensor:
        """Returns the values of a chunk, (batch, columns, features)."""
        return _with_prefix(self.v[chunk.b, chunk.group], self.prefix_v, chunk.group)

    def scores(self, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Returns s (batch, heads, queries, columns), and the derivative of the cap; None without one."""
        s, slope = _by_keys(chunk.of_heads(self.q), self.keys(chunk).mT).to(self.sums).mul_(self.scale), None
        if self.cap:
            t = s.div_(self.cap).tanh_()
            slope, s = t.square().neg_().add_(1), t.mul_(self.cap)
        if self.mask is not None:
            b = chunk.b if self.mask.shape[0] > 1 else slice(None)
            rows = chunk.rows if self.mask.shape[2] > 1 else slice(None)
            s[..., self.prefix :] += self.mask[b, :, rows].to(self.sums)
        return s, slope

    def kept(self, chunk: _Chunk) -> Tensor | float:
        """Returns dropout's factors: 0 for a dropped probability, and the keep scale for the others."""
        if self.dropout == 0:
            return 1.0
        assert self.seed is not None
        _, heads, queries, _ = self.q.shape
        first, last, _ = chunk.rows.indices(queries)
        masks = [
            philox.keep_mask(self.seed, (last - first, self.columns), self.dropout, (b * heads + h) * queries + first)
            for b in range(*chunk.b.indices(self.q.shape[0]))
            for h in range(chunk.heads.start, chunk.heads.stop)
        ]
        kept = torch.stack(masks)
        kept = kept.view(-1, chunk.heads.stop - chunk.heads.start, *kept.shape[1:])
        return kept.to(self.sums).mul_(philox.keep_scale(self.dropout))


def chunk_slices(batch: int, shared: int, queries: int, columns: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yields some sentences at a time, and for these all queries in parts; ``shared`` heads are together."""
    rows = max(1, CHUNK_BYTES // (4 * max(1, columns) * shared))
    step, some = min(max(1, queries), rows), max(1, rows // max(1, queries))
    parts = [slice(first, min(first + step, queries)) for first in range(0, queries, step)]
    for b in range(0, batch, some):
        yield slice(b, min(b + some, batch)), parts


def _with_prefix(own: Tensor, prefix: Tensor | None, group: int) -> Tensor:
    if prefix is None:
        return own
    return torch.cat([prefix[:, group].to(own.dtype).expand(own.shape[0], -1, -1), own], 1)


def _by_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """Returns rows (batch, heads, queries, n) keys (batch, n, m), as one product a sentence."""
    return (rows.flatten(1, 2) @ keys).view(*rows.shape[:3], keys.shape[2])


def _by_heads(weights: Tensor, rows: Tensor) -> Tensor:
    """Returns Σ weightsᵀ rows over heads and queries, (batch, columns, features)."""
    return weights.flatten(1, 2).mT @ rows.flatten(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cap: float,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    kernel = dispatch(OP, q.device, backend, q.dtype)
    return kernel(q, k, v, mask, prefix_k, prefix_v, cap, scale, dropout, seed)


def _forward_fake(q: Tensor, *_: Any) -> Tensor:
    return like_heads(q)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cap: float,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = dispatch(f"{OP}_backward", q.device, backend, q.dtype)
    return kernel(do, q, k, v, o, mask, prefix_k, prefix_v, cap, scale, dropout, seed)


def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, mask: Tensor | None, prefix_k: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size, sums = 0 if prefix_k is None else prefix_k.shape, accumulate_dtype(q.dtype)
    dtype = q.dtype if prefix_k is None else sums
    dprefix_k, dprefix_v = (q.new_empty(size, dtype=dtype) for _ in range(2))
    return like_heads(q), like_heads(k), like_heads(v), dprefix_k, dprefix_v


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    q, k, v, mask, prefix_k, prefix_v, ctx.cap, ctx.scale, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, output, mask, prefix_k, prefix_v, seed)


def _gradients(ctx: Any, needs: Sequence[Any], do: Tensor) -> tuple[Any, ...]:
    q, k, v, o, mask, prefix_k, prefix_v, seed = ctx.saved_tensors
    options = ctx.cap, ctx.scale, ctx.dropout, seed, ctx.backend
    dq, dk, dv, *dprefix = torch.ops.petl.capped_attention_backward(
        do.to(q.dtype), q, k, v, o, mask, prefix_k, prefix_v, *options
    )
    dprefix = (
        None if own is None else own_grad.to(own.dtype)
        for own, own_grad in zip((prefix_k, prefix_v), dprefix, strict=True)
    )
    return dq, dk, dv, None, *dprefix, *[None] * 5


_OPTIONS = "float cap, float scale, float dropout, Tensor? seed, str backend"

define(
    OP,
    f"(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? prefix_k, Tensor? prefix_v, {_OPTIONS}) -> Tensor",
    _forward,
    _forward_fake,
    autocast=(0, 1, 2),
)
define(
    f"{OP}_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor? mask, Tensor? prefix_k, Tensor? prefix_v, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate(OP, _save, _gradients)
