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

A packed row is a batch of one whose tokens are those of n sentences, end to end: cu_seqlens_q and cu_seqlens_k
(n + 1,) say where they begin, the last number being Lq and Lk. Sentence s has the queries from cu_seqlens_q[s] and the
keys from cu_seqlens_k[s] on, up to the next one's; its queries see its keys and the prefix. Sentences without queries,
without keys or without either may stand anywhere. Work and memory are those of the sentences, never Lq · Lk; only the
reference, where it must not wait for a device to read the boundaries, walks over all keys (in chunks). Nothing reads
them on the host but on a CPU.

distance_bias (H, 2R + 1) adds distance_bias[h, clamp(j - i - shift, -R, R) + R] to the score of query i and key j,
where i + shift is level with i: shift = Lk - Lq, in packed rows that of the sentence's end, cu_seqlens_k[s + 1] -
cu_seqlens_q[s + 1], so that i and j may be positions in the row. causal hides j > i + shift. The prefix gets none.
ddistance_bias = dS, summed in fp32 over batch rows and all pairs at that distance. With R = max_distance it is T5's
bias, whose buckets are constant from there on.

Dropout is that of ``philox`` in the order of its ``place``, with a row of the mask for each (B, H, Lq): the prefix in
front, and the keys from the next multiple of 32 on, filled up to one. Backward draws the mask again. In a packed row,
too, an element's place is that of its query and key in the row, as if the others were there and hidden.

Saves: q, k, v and o (8HD bytes per token in bf16, where Lq = Lk) and lse (4H). mask, bias, prefix, seed, boundaries
and distance_bias as given.
Source: Dao, arXiv 2307.08691 (lse, delta); Li and Liang, arXiv 2101.00190 (prefixes); Raffel et al., arXiv 1910.10683
(relative position bias).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, register
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
from petl_kernels.ops.room import roomy, writes_where_told

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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v; q (B, H, Lq, D), k and v (B, H, Lk, D) -> (B, H, Lq, D).

    scale is D^-0.5 by default. The result's memory is (B, Lq, H, D): ``o.transpose(1, 2).reshape(B, Lq, H * D)`` is a
    view. seed: int64 tensor of shape (1,) on q's device, drawn with ``torch.randint`` when dropout > 0 and none is
    given.

    cu_seqlens_q, cu_seqlens_k: int32 (sentences + 1,) on q's device, for packed rows (B = 1): where each sentence
    begins, and last the number of tokens. The queries of a sentence see its keys, and the prefix, alone. Sentences may
    be empty. distance_bias: (H, 2R + 1), added by the distance between key and query; it may require grad.

    Raises InputError: shapes, dtypes or devices that do not fit, a mask that requires grad, one half of a prefix or of
    the boundaries, a mask or a bias beside boundaries, boundaries that no row has (on a CPU; other devices do not wait
    for their values), dropout outside [0, 1) or over 2^32 probabilities.
    """
    _check(q, k, v, mask, bias, dropout, seed, prefix_k, prefix_v)
    _check_packed(q, k, mask, bias, cu_seqlens_q, cu_seqlens_k)
    _check_distance_bias(distance_bias, q)
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = philox.draw_seed(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, _ = torch.ops.petl.attention(
        q, k, v, mask, bias, prefix_k, prefix_v, bool(causal), scale, float(dropout), seed,
        cu_seqlens_q, cu_seqlens_k, distance_bias, active(),
    )  # fmt: skip
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
    philox.check_rate(op, dropout)
    probabilities = batch * heads * queries * mask_columns(prefix, keys)[1]
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


def _check_packed(q, k, mask, bias, cu_seqlens_q, cu_seqlens_k) -> None:
    op = "attention"
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise InputError(f"{op}: {missing} is None and the other one is not: expected both or none")
    if cu_seqlens_q is None:
        return
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32:
            raise InputError(f"{op}: {name} has dtype {cu.dtype}: expected torch.int32")
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise InputError(f"{op}: {name} has shape {shape(cu)}: expected (sentences + 1,) for one sentence or more")
        check_device(op, name, cu, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"that of cu_seqlens_q, {shape(cu_seqlens_q)}"
        raise InputError(f"{op}: cu_seqlens_k has shape {shape(cu_seqlens_k)}: expected {expected}")
    if q.shape[0] != 1:
        raise InputError(f"{op}: q has shape {shape(q)}: expected a batch of 1 with cu_seqlens_q")
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None:
            raise InputError(f"{op}: {name} is given with cu_seqlens_q: expected None (sentences see only themselves)")


def _check_boundaries(name: str, cu: Tensor, tokens: int) -> None:
    values = cu.tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise InputError(f"attention: {name} goes from {values[0]} to {values[-1]}: expected 0 to {tokens}, the tokens")
    for sentence, (start, stop) in enumerate(itertools.pairwise(values)):
        if stop < start:
            raise InputError(f"attention: {name} has {start}, {stop} at {sentence}: expected numbers that do not fall")


def _check_distance_bias(distance_bias: Tensor | None, q: Tensor) -> None:
    if distance_bias is None:
        return
    name, heads = "distance_bias", q.shape[1]
    if distance_bias.dim() != 2 or distance_bias.shape[0] != heads or distance_bias.shape[1] % 2 == 0:
        expected = f"({heads}, 2R + 1), an odd number of distances"
        raise InputError(f"attention: {name} has shape {shape(distance_bias)}: expected {expected}")
    if not distance_bias.is_floating_point():
        raise InputError(f"attention: {name} has dtype {distance_bias.dtype}: expected a floating-point tensor")
    check_device("attention", name, distance_bias, q)


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


def mask_columns(prefix: int, keys: int) -> tuple[int, int]:
    """Where in a row of the dropout mask the keys begin, and how long a row is: both in whole groups."""
    first, own = (-(-length // philox.GROUP) * philox.GROUP for length in (prefix, keys))
    return first, first + own


@register("attention", "reference")
def reference(
    q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )
    o, lse = _outputs(q)
    for chunk in inputs.chunks():
        s = inputs.scores(chunk)
        p, lse[chunk.queries] = _softmax(s)
        o[chunk.queries] = inputs.weighted_values(chunk, (p * inputs.kept(chunk)).to(q.dtype))
    return o, lse


@register("attention_backward", "reference")
def reference_backward(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
    cu_seqlens_q, cu_seqlens_k, distance_bias, need_ddistance_bias,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sums = accumulate_dtype(q.dtype)
    inputs = _Inputs(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )
    prefix = inputs.prefix
    dq, dk, dv = (_like_heads(tensor) for tensor in (q, k, v))
    dk.zero_(), dv.zero_()  # keys that no query is held against
    dbias = bias.new_zeros(bias.shape, dtype=sums) if need_dbias else empty(q)
    ddistance = distance_bias.new_zeros(distance_bias.shape, dtype=sums) if need_ddistance_bias else empty(q)
    dprefix_k, dprefix_v = (q.new_zeros(_heads_first(p).shape, dtype=sums) for p in (inputs.prefix_k, inputs.prefix_v))
    dk_sum = dv_sum = None
    for chunk in inputs.chunks():
        b, h, rows = part = chunk.queries
        # A row is whole here, so its softmax is taken again: unlike exp(S - lse) it survives an additive mask that
        # hides all keys with finfo.min, in whose lse the logarithm of the sum is lost.
        p, _ = _softmax(inputs.scores(chunk))
        kept = inputs.kept(chunk)
        do_part = do[part]
        delta = (do_part.to(sums) * o[part].to(sums)).sum(-1, keepdim=True)
        ds = p * (inputs.against_values(chunk, do_part) * kept - delta)
        if need_dbias:
            dbias[b if bias.shape[0] > 1 else slice(0, 1), h, rows] += _sum_to(ds[..., prefix:], bias.shape[0])
        if need_ddistance_bias:
            ddistance[h] += inputs.summed_by_distance(chunk, ds[..., prefix:].sum(0))
        ds, p = (ds * scale).to(q.dtype), (p * kept).to(q.dtype)

        dq[part] = inputs.weighted_keys(chunk, ds)
        # The queries of a head may come in several chunks: sums over them are not rounded in between.
        if chunk.first:
            dk_sum, dv_sum = (k.new_zeros(k[chunk.seen].shape, dtype=sums) for _ in range(2))
        dk_sum += ds[..., prefix:].mT @ q[part]
        dv_sum += p[..., prefix:].mT @ do_part
        if chunk.last:
            dk[chunk.seen], dv[chunk.seen] = dk_sum, dv_sum
        if prefix:
            dprefix_k[h] += _over_batch(ds[..., :prefix]).to(sums).mT @ _over_batch(q[part]).to(sums)
            dprefix_v[h] += _over_batch(p[..., :prefix]).to(sums).mT @ _over_batch(do_part).to(sums)
    dprefix = (grad.transpose(0, 1).contiguous() for grad in (dprefix_k, dprefix_v))
    return dq, dk, dv, dbias, *dprefix, ddistance


class _Chunk(NamedTuple):
    """Some batch rows, heads and queries, and the keys that these are held against."""

    b: slice
    h: slice
    rows: slice
    keys: slice
    first: bool  # of the chunks that go over the queries of these heads and keys
    last: bool

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.b, self.h, self.rows

    @property
    def seen(self) -> tuple[slice, slice, slice]:
        return self.b, self.h, self.keys


class _Inputs:
    """What the scores of a chunk are made of."""

    def __init__(
        self, q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias
    ):
        self.q, self.k, self.v, self.mask, self.bias = q, k, v, mask, bias
        self.causal, self.scale, self.dropout, self.seed = causal, scale, dropout, seed
        self.cu_q, self.cu_k, self.distance_bias = cu_q, cu_k, distance_bias
        nothing = q.new_empty(0, q.shape[1], q.shape[3])
        self.prefix_k = nothing if prefix_k is None else prefix_k.to(q.dtype)
        self.prefix_v = nothing if prefix_v is None else prefix_v.to(q.dtype)
        self.prefix = self.prefix_k.shape[0]
        self.sums = accumulate_dtype(q.dtype)
        if cu_q is not None:
            positions = torch.arange(q.shape[2], dtype=cu_q.dtype, device=q.device)
            sentence = torch.searchsorted(cu_q.contiguous(), positions, right=True) - 1
            self.start, self.stop = cu_k[sentence], cu_k[sentence + 1]  # of the keys that each query sees
            self.shift = self.stop - cu_q[sentence + 1]

    def chunks(self) -> Iterator[_Chunk]:
        batch, heads = self.q.shape[:2]
        for queries, keys in self.sentences():
            count = queries.stop - queries.start
            for b, h, rows in transient_chunks(batch, heads, count, self.prefix + keys.stop - keys.start):
                inside = slice(queries.start + rows.start, queries.start + rows.stop)
                yield _Chunk(b, h, inside, keys, rows.start == 0, rows.stop == count)

    def sentences(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of one sentence after the other; all of them together where reading the boundaries waits."""
        if self.cu_q is None or not _is_read_without_waiting(self.cu_q):
            yield slice(0, self.q.shape[2]), slice(0, self.k.shape[2])
            return
        for queries, keys in zip(*map(itertools.pairwise, (self.cu_q.tolist(), self.cu_k.tolist())), strict=True):
            yield slice(*queries), slice(*keys)

    def scores(self, chunk: _Chunk) -> Tensor:
        """S of one chunk: (batch, heads, queries, prefix + keys)."""
        q = self.q[chunk.queries]
        s = (q @ self.k[chunk.seen].mT).to(self.sums) * self.scale
        if self.bias is not None:
            s = s + _slice(self.bias, chunk.queries).to(self.sums)
        if self.distance_bias is not None:
            reach = self.distance_bias.shape[1] // 2
            s = s + self.distance_bias[chunk.h][:, self.distances(chunk).clamp(-reach, reach) + reach].to(self.sums)
        if self.mask is not None:
            mask = _slice(self.mask, chunk.queries)
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(self.sums)
        if self.causal:
            s = s.masked_fill(self.distances(chunk) > 0, -torch.inf)
        if self.cu_q is not None:
            j = torch.arange(chunk.keys.start, chunk.keys.stop, device=q.device)
            start, stop = self.start[chunk.rows, None], self.stop[chunk.rows, None]
            s = s.masked_fill((j < start) | (j >= stop), -torch.inf)
        if not self.prefix:
            return s
        s_prefix = (q @ _heads_first(self.prefix_k)[chunk.h].mT).to(self.sums) * self.scale
        return torch.cat([s_prefix, s], -1)

    def distances(self, chunk: _Chunk) -> Tensor:
        """How far behind its query a key is, where a sentence's last key and last query are level: (queries, keys)."""
        i = torch.arange(chunk.rows.start, chunk.rows.stop, device=self.q.device)
        j = torch.arange(chunk.keys.start, chunk.keys.stop, device=self.q.device)
        shift = self.k.shape[2] - self.q.shape[2] if self.cu_q is None else self.shift[chunk.rows]
        return j - (i + shift)[:, None]

    def summed_by_distance(self, chunk: _Chunk, ds: Tensor) -> Tensor:
        """(heads, queries, keys) as (heads, 2R + 1)."""
        reach, keys = self.distance_bias.shape[1] // 2, ds.shape[2]
        distances = self.distances(chunk)
        total = ds.new_zeros(ds.shape[0], 2 * reach + 1)
        if keys == 0:
            return total
        # A gather and not a scatter, whose order of additions differs from run to run on a GPU.
        columns = torch.arange(-reach, reach + 1, device=ds.device) - distances[:, :1]
        inside = (columns >= 0) & (columns < keys)
        at_distance = ds.gather(2, columns.clamp(0, keys - 1).expand(len(ds), -1, -1))
        total += at_distance.masked_fill(~inside, 0).sum(1)
        total[:, 0] += ds.masked_fill(distances >= -reach, 0).sum((1, 2))
        total[:, -1] += ds.masked_fill(distances <= reach, 0).sum((1, 2))
        return total

    def weighted_values(self, chunk: _Chunk, p: Tensor) -> Tensor:
        """p v"""
        return self._weighted(chunk, p, self.v, self.prefix_v)

    def weighted_keys(self, chunk: _Chunk, ds: Tensor) -> Tensor:
        """ds k"""
        return self._weighted(chunk, ds, self.k, self.prefix_k)

    def _weighted(self, chunk: _Chunk, weights: Tensor, rows: Tensor, prefix: Tensor) -> Tensor:
        total = weights[..., self.prefix :] @ rows[chunk.seen]
        return total + weights[..., : self.prefix] @ _heads_first(prefix)[chunk.h] if self.prefix else total

    def against_values(self, chunk: _Chunk, do: Tensor) -> Tensor:
        """do vᵀ"""
        dp = (do @ self.v[chunk.seen].mT).to(self.sums)
        if not self.prefix:
            return dp
        return torch.cat([(do @ _heads_first(self.prefix_v)[chunk.h].mT).to(self.sums), dp], -1)

    def kept(self, chunk: _Chunk) -> Tensor | float:
        """0 where dropout drops a probability, else what it multiplies those that it keeps by."""
        if self.dropout == 0:
            return 1.0
        _, heads, queries, _ = self.q.shape
        b, h, rows = chunk.queries
        size = (b.stop - b.start, h.stop - h.start, rows.stop - rows.start)
        first = (b.start * heads + h.start) * queries + rows.start
        first_key, columns = mask_columns(self.prefix, self.k.shape[2])
        own = torch.arange(chunk.keys.start, chunk.keys.stop, device=self.q.device) + first_key
        places = philox.place(torch.cat([torch.arange(self.prefix, device=self.q.device), own]))
        if own.shape[0] == self.k.shape[2]:
            mask = philox.keep_mask(self.seed, (*size, columns), self.dropout, first)[..., places]
        else:  # one sentence of a packed row
            head, row = (torch.arange(n, device=self.q.device) for n in size[1:])
            at = (head[:, None] * queries + row + first)[None]
            mask = philox.keep_elements(self.seed, at, places, columns, self.dropout)
        return mask.to(self.sums) * philox.keep_scale(self.dropout)


def _is_read_without_waiting(cu: Tensor) -> bool:
    return cu.device.type == "cpu"


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


def _forward(
    q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias,
    backend,
):  # fmt: skip
    if cu_seqlens_q is not None and _is_read_without_waiting(cu_seqlens_q):
        _check_boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[2])
        _check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[2])
    kernel = dispatch("attention", q.device, backend, q.dtype)
    return kernel(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )


def _forward_fake(q, *_):
    return _outputs(q)


def _backward(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
    cu_seqlens_q, cu_seqlens_k, distance_bias, need_ddistance_bias, backend, rooms=(),
):  # fmt: skip
    """rooms: how much is behind rows of [dq dk dv], or behind those of dq and of [dk dv]; without any each is alone."""
    kernel = dispatch("attention_backward", q.device, backend, q.dtype)
    arguments = (
        do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
        cu_seqlens_q, cu_seqlens_k, distance_bias, need_ddistance_bias,
    )  # fmt: skip
    into = _side_by_side(q, k, v, rooms) if rooms else None
    if into is not None and writes_where_told("attention_backward", kernel, q):
        dq, dk, dv, *to_sums = kernel(*arguments, into)
    else:
        dq, dk, dv, *to_sums = kernel(*arguments)
    if into is not None:
        for own, grad in zip(into, (dq, dk, dv), strict=True):
            if grad is not own:
                own.copy_(grad)
        dq, dk, dv = into
    sums = accumulate_dtype(q.dtype)
    return dq, dk, dv, *(grad.to(sums) for grad in to_sums)


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, rooms: Sequence[int]) -> list[Tensor]:
    """Empty tensors like q, k and v, in the columns of one matrix with room behind its rows, or of two matrices."""
    together = ([q, k, v],) if len(rooms) == 1 else ([q], [k, v])
    return [part for own, room in zip(together, rooms, strict=True) for part in _columns(own, room)]


def _columns(like: list[Tensor], room: int) -> list[Tensor]:
    batch, heads, length, features = like[0].shape
    rows = roomy(like[0], (batch, length, len(like) * heads * features), room)
    return [part.unflatten(2, (heads, features)).transpose(1, 2) for part in rows.chunk(len(like), 2)]


def _backward_fake(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
    cu_seqlens_q, cu_seqlens_k, distance_bias, need_ddistance_bias, backend, rooms=(),
):  # fmt: skip
    sums = accumulate_dtype(q.dtype)
    prefix = (0, q.shape[1], q.shape[3]) if prefix_k is None else prefix_k.shape
    dbias = q.new_empty(bias.shape if need_dbias else 0, dtype=sums)
    dprefix = (q.new_empty(prefix, dtype=sums) for _ in range(2))
    ddistance = q.new_empty(distance_bias.shape if need_ddistance_bias else 0, dtype=sums)
    grads = _side_by_side(q, k, v, rooms) if rooms else map(_like_heads, (q, k, v))
    return (*grads, dbias, *dprefix, ddistance)


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, bias, prefix_k, prefix_v, ctx.causal, ctx.scale, ctx.dropout, seed, *packed, ctx.backend = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, mask, bias, prefix_k, prefix_v, seed, *packed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx, needs, do: Tensor | None, _):
    if do is None:
        return (None,) * len(needs)
    q, k, v, o, lse, mask, bias, prefix_k, prefix_v, seed, cu_q, cu_k, distance_bias = ctx.saved_tensors
    dq, dk, dv, *to_cast = torch.ops.petl.attention_backward(
        do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, ctx.causal, ctx.scale, ctx.dropout, seed, needs[4],
        cu_q, cu_k, distance_bias, needs[13], ctx.backend,
    )  # fmt: skip
    dq, dk, dv = (grad if need else None for grad, need in zip((dq, dk, dv), needs[:3], strict=True))
    parameters, needed = (bias, prefix_k, prefix_v, distance_bias), (*needs[4:7], needs[13])
    dbias, *dprefix, ddistance = (
        grad.to(parameter.dtype) if need else None
        for grad, parameter, need in zip(to_cast, parameters, needed, strict=True)
    )
    return dq, dk, dv, None, dbias, *dprefix, None, None, None, None, None, None, ddistance, None


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? prefix_k, Tensor? prefix_v, bool causal,"
    " float scale, float dropout, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? distance_bias,"
    " str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    autocast=(0, 1, 2),
)
define(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? mask, Tensor? bias, Tensor? prefix_k,"
    " Tensor? prefix_v, bool causal, float scale, float dropout, Tensor? seed, bool need_dbias, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? distance_bias, bool need_ddistance_bias, str backend, int[] rooms=[])"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("attention", _save, _gradients)
