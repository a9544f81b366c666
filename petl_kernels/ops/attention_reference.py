"""The reference of ``attention`` (``ops/attention.py`` has the formulas): chunk by chunk of the probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from petl_kernels.dispatch import register
from petl_kernels.ops import philox
from petl_kernels.ops.define import accumulate_dtype, empty

CHUNK_BYTES = 16 * 2**20  # of the probabilities of a chunk, in fp32


def transient_chunks(batch: int, heads: int, queries: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yields slices of (batch, heads, queries), each a contiguous run of (batch, heads, queries, columns).

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
    """Returns where in a row of the dropout mask the keys begin, and the length of a row: multiples of a group."""
    first, own = (-(-length // philox.GROUP) * philox.GROUP for length in (prefix, keys))
    return first, first + own


@register("attention", "reference")
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    distance_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = Inputs(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )
    o, lse = empty_outputs(q)
    for chunk in inputs.chunks():
        s = inputs.scores(chunk)
        p, lse[chunk.queries] = _softmax(s)
        o[chunk.queries] = inputs.weighted_values(chunk, (p * inputs.kept(chunk)).to(q.dtype))
    return o, lse


@register("attention_backward", "reference")
def reference_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_dbias: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    distance_bias: Tensor | None,
    need_ddistance_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = accumulate_dtype(q.dtype)
    inputs = Inputs(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )
    prefix = inputs.prefix
    dq, dk, dv = (like_heads(tensor) for tensor in (q, k, v))
    dk.zero_()  # for keys that no query sees
    dv.zero_()
    dbias = _zeros(bias, sums) if need_dbias else empty(q)
    ddistance = _zeros(distance_bias, sums) if need_ddistance_bias else empty(q)
    dprefix_k, dprefix_v = (q.new_zeros(_heads_first(p).shape, dtype=sums) for p in (inputs.prefix_k, inputs.prefix_v))
    dk_sum, dv_sum = empty(k), empty(v)
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
            assert bias is not None
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
    dprefix_k, dprefix_v = (grad.transpose(0, 1).contiguous() for grad in (dprefix_k, dprefix_v))
    return dq, dk, dv, dbias, dprefix_k, dprefix_v, ddistance


class Chunk(NamedTuple):
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


class Inputs:
    """The inputs of an attention, and the scores and sums of their chunks."""

    # In packed rows, of each query: where the keys that it sees begin and end, and how far on the level one is.
    start: Tensor
    stop: Tensor
    shift: Tensor

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        distance_bias: Tensor | None,
    ):
        self.q, self.k, self.v, self.mask, self.bias = q, k, v, mask, bias
        self.causal, self.scale, self.dropout, self.seed = causal, scale, dropout, seed
        self.cu_q, self.cu_k, self.distance_bias = cu_q, cu_k, distance_bias
        nothing = q.new_empty(0, q.shape[1], q.shape[3])
        self.prefix_k = nothing if prefix_k is None else prefix_k.to(q.dtype)
        self.prefix_v = nothing if prefix_v is None else prefix_v.to(q.dtype)
        self.prefix = self.prefix_k.shape[0]
        self.sums = accumulate_dtype(q.dtype)
        if cu_q is not None and cu_k is not None:
            positions = torch.arange(q.shape[2], dtype=cu_q.dtype, device=q.device)
            sentence = torch.searchsorted(cu_q.contiguous(), positions, right=True) - 1
            self.start, self.stop = cu_k[sentence], cu_k[sentence + 1]
            self.shift = self.stop - cu_q[sentence + 1]

    def chunks(self) -> Iterator[Chunk]:
        batch, heads = self.q.shape[:2]
        for queries, keys in self.sentences():
            count = queries.stop - queries.start
            for b, h, rows in transient_chunks(batch, heads, count, self.prefix + keys.stop - keys.start):
                inside = slice(queries.start + rows.start, queries.start + rows.stop)
                yield Chunk(b, h, inside, keys, rows.start == 0, rows.stop == count)

    def sentences(self) -> Iterator[tuple[slice, slice]]:
        """Yields queries and keys of each sentence; all of them together where reading the boundaries would wait."""
        if self.cu_q is None or self.cu_k is None or not reads_without_waiting(self.cu_q):
            yield slice(0, self.q.shape[2]), slice(0, self.k.shape[2])
            return
        cu_q: list[int] = self.cu_q.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        cu_k: list[int] = self.cu_k.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        for queries, keys in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
            yield slice(*queries), slice(*keys)

    def scores(self, chunk: Chunk) -> Tensor:
        """Returns S of one chunk, (batch, heads, queries, prefix + keys)."""
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

    def distances(self, chunk: Chunk) -> Tensor:
        """Returns how far behind its query a key is, (queries, keys); the last of both are level."""
        i = torch.arange(chunk.rows.start, chunk.rows.stop, device=self.q.device)
        j = torch.arange(chunk.keys.start, chunk.keys.stop, device=self.q.device)
        shift = self.k.shape[2] - self.q.shape[2] if self.cu_q is None else self.shift[chunk.rows]
        return j - (i + shift)[:, None]

    def summed_by_distance(self, chunk: Chunk, ds: Tensor) -> Tensor:
        """Returns (heads, queries, keys) summed to (heads, 2R + 1)."""
        assert self.distance_bias is not None
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

    def weighted_values(self, chunk: Chunk, p: Tensor) -> Tensor:
        """Returns p v."""
        return self._weighted(chunk, p, self.v, self.prefix_v)

    def weighted_keys(self, chunk: Chunk, ds: Tensor) -> Tensor:
        """Returns ds k."""
        return self._weighted(chunk, ds, self.k, self.prefix_k)

    def _weighted(self, chunk: Chunk, weights: Tensor, rows: Tensor, prefix: Tensor) -> Tensor:
        total = weights[..., self.prefix :] @ rows[chunk.seen]
        return total + weights[..., : self.prefix] @ _heads_first(prefix)[chunk.h] if self.prefix else total

    def against_values(self, chunk: Chunk, do: Tensor) -> Tensor:
        """Returns do vᵀ."""
        dp = (do @ self.v[chunk.seen].mT).to(self.sums)
        if not self.prefix:
            return dp
        return torch.cat([(do @ _heads_first(self.prefix_v)[chunk.h].mT).to(self.sums), dp], -1)

    def kept(self, chunk: Chunk) -> Tensor | float:
        """Returns dropout's factors: 0 for a dropped probability, and the keep scale for the others."""
        if self.dropout == 0:
            return 1.0
        assert self.seed is not None
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


def reads_without_waiting(cu: Tensor) -> bool:
    return cu.device.type == "cpu"


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns P and lse; a query that sees nothing has P = 0 and lse = inf."""
    lse = torch.logsumexp(s, -1)
    blind = lse == -torch.inf
    return s.softmax(-1).masked_fill(blind[..., None], 0), lse.masked_fill(blind, torch.inf)


def _slice(tensor: Tensor, part: tuple[slice, slice, slice]) -> Tensor:
    """Returns the part of a mask or a bias, whose dimensions of size 1 are broadcast."""
    return tensor[tuple(s if size > 1 else slice(None) for s, size in zip(part, tensor.shape, strict=False))]


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert like is not None
    return like.new_zeros(like.shape, dtype=dtype)


def _sum_to(ds: Tensor, batch: int) -> Tensor:
    return ds if batch > 1 else ds.sum(0, keepdim=True)


def _heads_first(prefix: Tensor) -> Tensor:
    """Returns (P, H, D) as (H, P, D)."""
    return prefix.transpose(0, 1)


def _over_batch(rows: Tensor) -> Tensor:
    """Returns (batch, heads, queries, n) as (heads, batch · queries, n): a sum over rows is one over the batch too."""
    return rows.transpose(0, 1).flatten(1, 2)


def like_heads(x: Tensor) -> Tensor:
    """Returns an empty (B, H, L, D) over memory of shape (B, L, H, D)."""
    batch, heads, length, features = x.shape
    return x.new_empty(batch, length, heads, features).transpose(1, 2)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return like_heads(q), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
