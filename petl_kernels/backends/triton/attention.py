"""attention in Triton: flash forward and backward, with the prefix as blocks of keys in front of the others.

Forward, one launch: a block of queries walks over the blocks of the prefix, then over those of the keys, with one
online softmax. Backward of short sentences, one launch: a program has a head of a sentence, and makes scores and mask
once for all gradients. Of longer ones, or with a prefix, two launches: dq by blocks of queries (with delta, which it
leaves for the other), dk and dv by blocks of keys; a prefix adds one of the latter kind, whose sums over each batch row
are added in a fixed order.

In a packed row each block finds the sentences of its queries (or keys) on the device, and walks over the keys (queries)
from the first to the last of them, with a mask where sentences meet.

An additive mask's finfo.min absorbs the score it is added to: of n keys that all have it, each gets 1/n. Their lse
would lose log n, so it is kept as a factor: such a query's lse is HIDDEN · (1 + log n).

The gradient of a bias by distance is a launch of its own, which makes scores again by blocks of distances.

A gradient of the bias and more than MAX_FEATURES features go to the reference, which works in chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import dropout_arguments, keep_probabilities, launch, load, store
from petl_kernels.dispatch import kernel_of
from petl_kernels.ops.attention import mask_columns

MAX_FEATURES = 128
HIDDEN = tl.constexpr(-1e30)  # the score of a key that an additive mask hides with so much or more
LOG2_E = tl.constexpr(1.4426950408889634)


def attention(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias):
    arguments = q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias
    if q.shape[3] > MAX_FEATURES:
        return kernel_of("attention", "reference")(*arguments)
    batch, heads, queries, _ = q.shape
    o, lse = _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    given = _Inputs(*arguments)
    tile = config.attention_tile(config.ATTENTION_FORWARD, q, dropout, distance_bias is not None)
    launch(
        _attention_kernel, (config.cdiv(queries, tile.m), batch * heads),
        o, lse, *given.tensors(), *given.packed(), *given.sizes(), _strides(o), *given.strides(), *given.numbers(),
        **given.constexprs(), BITS=given.bits(), BM=tile.m, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return o, lse


def attention_backward(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
    cu_q, cu_k, distance_bias, need_ddistance_bias, outs=None,
):  # fmt: skip
    """outs: dq, dk and dv are written there, views (B, H, L, D) of any strides but of adjacent features."""
    arguments = mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed
    packed = cu_q, cu_k, distance_bias
    if need_dbias or q.shape[3] > MAX_FEATURES:
        reference = kernel_of("attention_backward", "reference")
        grads = reference(do, q, k, v, o, lse, *arguments, need_dbias, *packed, need_ddistance_bias)
        if outs is None:
            return grads
        return *(out.copy_(own) for out, own in zip(outs, grads[:3], strict=True)), *grads[3:]
    given = _Inputs(q, k, v, *arguments, *packed)
    dq, dk, dv = (_like_heads(x) for x in (q, k, v)) if outs is None else outs
    do, o = _adjacent(do), _adjacent(o)
    delta = torch.empty_like(lse)
    tile = config.attention_sentence_tile(q, given.sentences(), cu_q is not None)
    if tile is None or given.prefix or need_ddistance_bias:
        dprefix = _gradients_by_blocks(dq, dk, dv, delta, do, o, lse, given)
    else:
        dprefix = (lse.new_empty(0, *q.shape[1::2]) for _ in range(2))
        _gradients_of_sentences(dq, dk, dv, delta, do, o, lse, given, tile)
    ddistance = _distance_gradient(do, lse, delta, given) if need_ddistance_bias else q.new_empty(0)
    return dq, dk, dv, q.new_empty(0), *dprefix, ddistance


def _gradients_of_sentences(dq, dk, dv, delta, do, o, lse, given: _Inputs, tile: config.Tile) -> None:
    """A program has one head of one sentence."""
    if dq.numel() == dk.numel() == 0:
        return
    _, heads, queries, features = dq.shape
    launch(
        _sentence_gradients_kernel, (given.sentences(), heads),
        dq, dk, dv, delta, do, o, lse, *given.tensors()[:5], given.seed, *given.packed()[:3], given.packed()[4],
        queries, given.k.shape[2], features, given.columns,
        *map(_strides, (dq, dk, dv, do, o)), *given.strides(), *given.numbers(), **given.constexprs(),
        BM=tile.m, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _gradients_by_blocks(dq, dk, dv, delta, do, o, lse, given: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the prefix: dq by blocks of queries, the others by blocks of keys."""
    batch, heads, queries, features = dq.shape
    tile = config.attention_tile(config.ATTENTION_BACKWARD, given.q, given.dropout, given.distance_bias is not None)
    options = {"BM": tile.m, "BN": tile.n, "warps": tile.warps, "stages": tile.stages}
    if dq.numel() > 0:
        launch(
            _query_gradient_kernel, (config.cdiv(queries, tile.m), batch * heads),
            dq, delta, do, o, lse, *given.tensors(), *given.packed(), *given.sizes(),
            _strides(dq), _strides(do), _strides(o), *given.strides(), *given.numbers(),
            **given.constexprs(), BITS=given.bits(), **options,
        )  # fmt: skip

    def key_gradients(dk, dv, given: _Inputs, first: int) -> None:
        if dk.numel() > 0:
            launch(
                _key_gradients_kernel, (config.cdiv(dk.shape[2], tile.n), batch * heads),
                dk, dv, do, lse, delta, *given.tensors()[:5], given.seed, *given.packed(), *given.sizes()[:3], features,
                first, given.columns, *map(_strides, (dk, dv, do)), *given.strides(), *given.numbers(),
                **given.constexprs(), BITS=given.bits(), **options,
            )  # fmt: skip

    key_gradients(dk, dv, given, given.first)
    if not given.prefix:
        return tuple(lse.new_empty(0, heads, features) for _ in range(2))
    partials = lse.new_empty(2, batch, heads, given.prefix, features)
    key_gradients(*partials, given.of_prefix(), 0)
    return tuple(partials.sum(1).transpose(1, 2).contiguous())


def _distance_gradient(do, lse, delta, given: _Inputs) -> torch.Tensor:
    """(H, 2R + 1): the sum of what each program finds in its blocks of queries, in their order."""
    batch, heads, queries, _ = given.q.shape
    distances, tile = given.distance_bias.shape[1], config.ATTENTION_DISTANCES
    blocks, tiles = config.cdiv(distances, tile.k), batch * config.cdiv(queries, tile.m)
    parts = max(1, min(tiles, config.cdiv(2 * config.processors(do.device), blocks * heads)))
    partials = do.new_zeros(parts, heads, distances, dtype=torch.float32)
    if tiles:
        launch(
            _distance_gradient_kernel, (blocks, heads, parts),
            partials, do, lse, delta, *given.tensors()[:5], given.seed, *given.packed(), *given.sizes(), tiles,
            _strides(do), *given.strides(), *given.numbers(),
            **given.constexprs(), BITS=given.bits(), BM=tile.m, BN=tile.n, BR=tile.k,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    return partials.sum(0)


class _Inputs:
    """The kernels' common arguments."""

    def __init__(
        self, q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias
    ):
        self.q, self.k, self.v = _adjacent(q), _adjacent(k), _adjacent(v)
        self.mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        self.bias, self.causal, self.scale, self.dropout, self.seed = bias, causal, scale, dropout, seed
        self.cu_q, self.cu_k = (cu if cu is None else cu.contiguous() for cu in (cu_q, cu_k))
        self.distance_bias = distance_bias if distance_bias is None else distance_bias.contiguous()
        self.prefix = 0 if prefix_k is None else prefix_k.shape[0]
        self.prefix_k, self.prefix_v = (
            p.to(q.dtype).contiguous() if self.prefix else None for p in (prefix_k, prefix_v)
        )
        self.first, self.columns = mask_columns(self.prefix, k.shape[2])

    def of_prefix(self) -> _Inputs:
        """The same queries before the prefix alone, which is hidden from nobody."""
        k, v = (p.transpose(0, 1).expand(self.q.shape[0], -1, -1, -1) for p in (self.prefix_k, self.prefix_v))
        nothing = (None,) * 3
        part = _Inputs(self.q, k, v, None, *nothing, False, self.scale, self.dropout, self.seed, *nothing)
        part.columns, part.first = self.columns, 0
        return part

    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.mask, self.bias, self.prefix_k, self.prefix_v, self.seed

    def packed(self) -> tuple:
        sentences = 0 if self.cu_q is None else self.cu_q.shape[0] - 1
        reach = 0 if self.distance_bias is None else self.distance_bias.shape[1] // 2
        return self.cu_q, self.cu_k, self.distance_bias, sentences, reach

    def sizes(self) -> tuple:
        _, heads, queries, features = self.q.shape
        return heads, queries, self.k.shape[2], features, self.prefix, self.first, self.columns

    def strides(self) -> tuple:
        return *map(_strides, (self.q, self.k, self.v)), _of_mask(self.mask), _broadcast(self.bias)

    def numbers(self) -> tuple:
        _, threshold, keep_scale, _ = dropout_arguments(self.dropout, self.seed)
        return self.scale, threshold, keep_scale

    def constexprs(self) -> dict:
        block = config.padded(self.q.shape[3], MAX_FEATURES)
        return {"CAUSAL": self.causal, "DROPOUT": self.dropout > 0, "BD": block}

    def sentences(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    def bits(self) -> int:
        """Returns how many bits the number of a packed row's sentence has."""
        return max(0, self.packed()[3] - 1).bit_length()


def _like_heads(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, features = x.shape
    return x.new_empty(batch, length, heads, features).transpose(1, 2)


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.stride()[:3])


def _broadcast(x: torch.Tensor | None) -> tuple[int, ...]:
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _of_mask(mask: torch.Tensor | None) -> tuple[int | None, ...]:
    """Without a stride of rows where all queries have the same: it is read once for a block of them then."""
    batch, head, row, column = _broadcast(mask)
    return batch, head, None if mask is not None and mask.shape[2] == 1 else row, column


@triton.jit
def _head(pointer, strides, b, h):
    return pointer + b * strides[0] + h * strides[1]


@triton.jit
def _span(cu, cu_other, tokens, length, sentences, BITS: tl.constexpr):
    """Where the sentence that each of `tokens` is in begins and ends on the other side, and by how much further its
    end is there. It is looked for in the boundaries: nothing outside of the device has to know them."""
    tokens = tl.minimum(tokens, length - 1)
    sentence = tl.zeros_like(tokens)
    for i in tl.static_range(BITS):
        after = sentence + (1 << (BITS - 1 - i))
        begins = tl.load(cu + after, mask=after < sentences, other=2147483647)
        sentence = tl.where(begins <= tokens, after, sentence)
    begin, end = tl.load(cu_other + sentence), tl.load(cu_other + sentence + 1)
    return begin, end, end - tl.load(cu + sentence + 1)


@triton.jit
def _steps(rows, cols, shift, reach):
    """How far each key is behind each query, at most `reach`. In 32 bits: a block of 64 costs twice the registers."""
    steps = cols[None, :].to(tl.int32) - rows[:, None].to(tl.int32) - shift
    return tl.minimum(tl.maximum(steps, -reach), reach)


@triton.jit
def _scores(
    q, k, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach, scale,
    hidden, CAUSAL: tl.constexpr,
):  # fmt: skip
    """S of a block of queries and a block of keys, `hidden` where an additive mask hides a key; mask, bias and distance
    point to the head. Query i is level with key i + shift; seen: the pairs of one sentence, None where all are."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (rows < queries)[:, None] & (cols < keys)[None, :]
    if bias is not None:
        pointers = bias + rows[:, None] * strides_bias[2] + cols[None, :] * strides_bias[3]
        s += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if distance is not None:
        s += tl.load(distance + (reach + _steps(rows, cols, shift, reach))).to(tl.float32)
    if mask is not None:
        if strides_mask[2] is None:  # one row for all queries
            pointers, inside = mask + cols[None, :] * strides_mask[3], (cols < keys)[None, :]
        else:
            pointers = mask + rows[:, None] * strides_mask[2] + cols[None, :] * strides_mask[3]
        if mask.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(pointers, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            added = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            s = tl.where((added <= HIDDEN) & (added > -float("inf")), hidden, s + added)
    if CAUSAL:
        s = tl.where(cols[None, :] <= rows[:, None] + shift, s, -float("inf"))
    if seen is not None:
        s = tl.where(seen, s, -float("inf"))
    return tl.where((cols < keys)[None, :], s, -float("inf"))


@triton.jit
def _exp(x):
    """exp(x), with numbers under 2^-126 as 0: four instructions fewer than tl.exp, which keeps them."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _attend(
    acc, largest, total, q, k, v, mask, bias, distance, seed, start, rows, begins, ends, shift, counters, queries, keys,
    features, columns, first, stride_k, stride_v, strides_mask, strides_bias, reach, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: acc = Σ kept exp(S - largest) v, total = Σ exp(S - largest)."""
    cols, d = start + tl.arange(0, BN), tl.arange(0, BD)
    k_tile = load(k + cols[:, None] * stride_k + d[None, :], cols < keys, d < features)
    seen = None
    if begins is not None:
        seen = (cols[None, :] >= begins[:, None]) & (cols[None, :] < ends[:, None])
    s = _scores(
        q, k_tile, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach,
        scale, HIDDEN, CAUSAL,
    )  # fmt: skip
    new = tl.maximum(largest, tl.max(s, 1))
    offset = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    p = _exp(s - offset[:, None])
    shrink = _exp(largest - offset)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        kept = keep_probabilities(seed, counters, first + start, columns, threshold, BN)
        p = tl.where(kept, p, 0.0)
    v_tile = load(v + cols[:, None] * stride_v + d[None, :], cols < keys, d < features)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit
def _span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS: tl.constexpr):
    """Where the keys that each query sees begin and end, and the key that query 0 would be level with.

    No bounds and one number where the row is not packed, else a column of numbers."""
    if cu_q is None:
        return None, None, keys - queries
    else:
        begins, ends, shift = _span(cu_q, cu_k, rows, queries, sentences, BITS)
        return begins, ends, shift[:, None]


@triton.jit
def _keys_to_walk(rows, begins, ends, shift, queries, keys, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """The keys that some of a block's queries see: first, a multiple of BN, and behind the last."""
    begin, stop = 0, keys
    if begins is not None:
        begin, stop = tl.min(begins) // BN * BN, tl.max(ends)
    if CAUSAL:
        stop = min(stop, tl.max(rows[:, None] + shift).to(tl.int32) + 1)
    return begin, stop


@triton.jit(do_not_specialize=["threshold"])
def _attention_kernel(
    o, lse, q, k, v, mask, bias, prefix_k, prefix_v, seed, cu_q, cu_k, distance, sentences, reach,
    heads, queries, keys, features, prefix, first, columns,
    strides_o, strides_q, strides_k, strides_v, strides_mask, strides_bias, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows, d = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64), tl.arange(0, BD)
    counters = head * queries + rows
    q_tile = load(_head(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], rows < queries, d < features)
    k, v = _head(k, strides_k, b, h), _head(v, strides_v, b, h)
    if mask is not None:
        mask = _head(mask, strides_mask, b, h)
    if bias is not None:
        bias = _head(bias, strides_bias, b, h)
    if distance is not None:
        distance += h * (2 * reach + 1)

    acc = tl.zeros((BM, BD), tl.float32)
    largest, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    if prefix_k is not None:
        stride = heads * features
        for start in range(0, prefix, BN):
            acc, largest, total = _attend(
                acc, largest, total, q_tile, prefix_k + h * features, prefix_v + h * features, None, None, None, seed,
                start, rows, None, None, 0, counters, queries, prefix, features, columns, 0,
                stride, stride, strides_mask, strides_bias, 0, scale, threshold, keep_scale, False, DROPOUT, BN, BD,
            )  # fmt: skip
    begins, ends, shift = _span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
    begin, stop = _keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
    for start in range(begin, stop, BN):
        acc, largest, total = _attend(
            acc, largest, total, q_tile, k, v, mask, bias, distance, seed, start,
            rows, begins, ends, shift, counters, queries, keys, features, columns, first,
            strides_k[2], strides_v[2], strides_mask, strides_bias, reach, scale, threshold, keep_scale,
            CAUSAL, DROPOUT, BN, BD,
        )  # fmt: skip

    blind = total == 0
    acc = acc * (keep_scale / tl.where(blind, 1.0, total))[:, None]
    log = tl.log(tl.where(blind, 1.0, total))
    value = tl.where(largest == HIDDEN, HIDDEN * (1 + log), largest + log)
    store(_head(o, strides_o, b, h) + rows[:, None] * strides_o[2] + d[None, :], acc, rows < queries, d < features)
    tl.store(lse + counters, tl.where(blind, float("inf"), value), mask=rows < queries)


@triton.jit
def _load_lse(pointers, inside):
    """lse, counting keys that an additive mask hides as `hidden`, which comes with it."""
    lse = tl.load(pointers, mask=inside, other=float("inf"))
    sees_hidden = lse <= HIDDEN
    return tl.where(sees_hidden, lse / HIDDEN - 1, lse), tl.where(sees_hidden, 0.0, -float("inf"))


@triton.jit
def _score_gradients(
    q, k, v, do, lse, hidden, delta, mask, bias, distance, seed, seen, rows, cols, shift, counters, queries, keys,
    columns, first, strides_mask, strides_bias, reach, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Returns what is kept of P, not scaled, and dS for a block of queries and one of keys, which begins at `first`."""
    s = _scores(
        q, k, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach, scale,
        hidden[:, None], CAUSAL,
    )  # fmt: skip
    p = _exp(s - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    dropped = p
    if DROPOUT:
        kept = keep_probabilities(seed, counters, first, columns, threshold, p.shape[1])
        dropped = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp, 0.0)
    return dropped, p * (dp * keep_scale - delta[:, None])


@triton.jit
def _add_query_gradient(
    acc, q, do, lse, hidden, delta, k, v, mask, bias, distance, seed, start, rows, begins, ends, shift, counters,
    queries, keys, features, columns, first, stride_k, stride_v, strides_mask, strides_bias, reach, scale, threshold,
    keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """acc += dS k"""
    cols, d = start + tl.arange(0, BN), tl.arange(0, BD)
    k_tile = load(k + cols[:, None] * stride_k + d[None, :], cols < keys, d < features)
    v_tile = load(v + cols[:, None] * stride_v + d[None, :], cols < keys, d < features)
    seen = None
    if begins is not None:
        seen = (cols[None, :] >= begins[:, None]) & (cols[None, :] < ends[:, None])
    _, ds = _score_gradients(
        q, k_tile, v_tile, do, lse, hidden, delta, mask, bias, distance, seed, seen, rows, cols, shift, counters,
        queries, keys, columns, first + start, strides_mask, strides_bias, reach, scale, threshold, keep_scale,
        CAUSAL, DROPOUT,
    )  # fmt: skip
    return tl.dot(ds.to(q.dtype), k_tile, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["threshold"])
def _query_gradient_kernel(
    dq, delta, do, o, lse, q, k, v, mask, bias, prefix_k, prefix_v, seed, cu_q, cu_k, distance, sentences, reach,
    heads, queries, keys, features, prefix, first, columns,
    strides_dq, strides_do, strides_o, strides_q, strides_k, strides_v, strides_mask, strides_bias,
    scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows, d = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64), tl.arange(0, BD)
    inside = rows < queries
    counters = head * queries + rows
    q_tile = load(_head(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], inside, d < features)
    do_tile = load(_head(do, strides_do, b, h) + rows[:, None] * strides_do[2] + d[None, :], inside, d < features)
    o_tile = load(_head(o, strides_o, b, h) + rows[:, None] * strides_o[2] + d[None, :], inside, d < features)
    lse_rows, hidden = _load_lse(lse + counters, inside)
    delta_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + counters, delta_rows, mask=inside)
    k, v = _head(k, strides_k, b, h), _head(v, strides_v, b, h)
    if mask is not None:
        mask = _head(mask, strides_mask, b, h)
    if bias is not None:
        bias = _head(bias, strides_bias, b, h)
    if distance is not None:
        distance += h * (2 * reach + 1)

    acc = tl.zeros((BM, BD), tl.float32)
    if prefix_k is not None:
        stride = heads * features
        for start in range(0, prefix, BN):
            acc = _add_query_gradient(
                acc, q_tile, do_tile, lse_rows, hidden, delta_rows, prefix_k + h * features, prefix_v + h * features,
                None, None, None, seed, start, rows, None, None, 0, counters, queries, prefix, features, columns,
                0, stride, stride, strides_mask, strides_bias, 0, scale, threshold, keep_scale, False, DROPOUT, BN, BD,
            )  # fmt: skip
    begins, ends, shift = _span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
    begin, stop = _keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
    for start in range(begin, stop, BN):
        acc = _add_query_gradient(
            acc, q_tile, do_tile, lse_rows, hidden, delta_rows, k, v, mask, bias, distance, seed, start,
            rows, begins, ends, shift, counters, queries, keys, features, columns, first,
            strides_k[2], strides_v[2], strides_mask, strides_bias, reach, scale, threshold, keep_scale,
            CAUSAL, DROPOUT, BN, BD,
        )  # fmt: skip
    dq_head = _head(dq, strides_dq, b, h)
    store(dq_head + rows[:, None] * strides_dq[2] + d[None, :], acc * scale, inside, d < features)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q, do, lse, delta, mask, bias, distance, seed, start, cols, begins, ends, shift, counters,
    queries, keys, features, columns, first, stride_q, stride_do, strides_mask, strides_bias, reach, scale, threshold,
    keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk + dSᵀ q and dv + (what is kept of P)ᵀ do, for the queries from `start` on that are before `queries`."""
    rows, d = start + tl.arange(0, BM), tl.arange(0, BD)
    inside = rows < queries
    q_tile = load(q + rows[:, None] * stride_q + d[None, :], inside, d < features)
    do_tile = load(do + rows[:, None] * stride_do + d[None, :], inside, d < features)
    lse_rows, hidden = _load_lse(lse + rows, inside)
    delta_rows = tl.load(delta + rows, mask=inside, other=0.0)
    seen = None
    if begins is not None:
        seen = (rows[:, None] >= begins[None, :]) & (rows[:, None] < ends[None, :])
    dropped, ds = _score_gradients(
        q_tile, k, v, do_tile, lse_rows, hidden, delta_rows, mask, bias, distance, seed, seen, rows, cols, shift,
        counters + rows, queries, keys, columns, first, strides_mask, strides_bias, reach, scale, threshold,
        keep_scale, CAUSAL, DROPOUT,
    )  # fmt: skip
    dv = tl.dot(tl.trans(dropped.to(do_tile.dtype)), do_tile, dv, input_precision="ieee")
    return tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["threshold"])
def _key_gradients_kernel(
    dk, dv, do, lse, delta, q, k, v, mask, bias, seed, cu_q, cu_k, distance, sentences, reach,
    heads, queries, keys, features, first, columns,
    strides_dk, strides_dv, strides_do, strides_q, strides_k, strides_v, strides_mask, strides_bias,
    scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; they are columns first to first + keys of all that the queries see."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    cols, d = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64), tl.arange(0, BD)
    k_tile = load(_head(k, strides_k, b, h) + cols[:, None] * strides_k[2] + d[None, :], cols < keys, d < features)
    v_tile = load(_head(v, strides_v, b, h) + cols[:, None] * strides_v[2] + d[None, :], cols < keys, d < features)
    q, do = _head(q, strides_q, b, h), _head(do, strides_do, b, h)
    if mask is not None:
        mask = _head(mask, strides_mask, b, h)
    if bias is not None:
        bias = _head(bias, strides_bias, b, h)
    if distance is not None:
        distance += h * (2 * reach + 1)

    dk_sum, dv_sum = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    begin, stop, shift, begins, ends = 0, queries, keys - queries, None, None
    if cu_q is not None:
        begins, ends, back = _span(cu_k, cu_q, cols, keys, sentences, BITS)
        begin, stop, shift = tl.min(begins), tl.max(ends), -back[None, :]
    if CAUSAL:  # the first query that sees the first of these keys
        begin = max(begin, tl.min(cols[None, :] - shift).to(tl.int32))
    counters = head * queries
    for start in range(begin // BM * BM, stop, BM):
        dk_sum, dv_sum = _add_key_gradients(
            dk_sum, dv_sum, k_tile, v_tile, q, do, lse + counters, delta + counters, mask, bias, distance, seed, start,
            cols, begins, ends, shift, counters, queries, keys, features, columns, first + tl.program_id(0) * BN,
            strides_q[2], strides_do[2], strides_mask, strides_bias, reach, scale, threshold, keep_scale,
            CAUSAL, DROPOUT, BM, BD,
        )  # fmt: skip
    dk_head, dv_head = _head(dk, strides_dk, b, h), _head(dv, strides_dv, b, h)
    store(dk_head + cols[:, None] * strides_dk[2] + d[None, :], dk_sum * scale, cols < keys, d < features)
    store(dv_head + cols[:, None] * strides_dv[2] + d[None, :], dv_sum * keep_scale, cols < keys, d < features)


@triton.jit(do_not_specialize=["threshold"])
def _sentence_gradients_kernel(
    dq, dk, dv, delta, do, o, lse, q, k, v, mask, bias, seed, cu_q, cu_k, distance, reach,
    queries, keys, features, columns, strides_dq, strides_dk, strides_dv, strides_do, strides_o,
    strides_q, strides_k, strides_v, strides_mask, strides_bias, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head of a sentence, a row of the batch or a part of a packed row.

    Up to BM queries stay, with their dq, while the keys go by: S, P and the mask are made once. A longer sentence of a
    packed row has them made twice, for dq by blocks of queries and for the others by blocks of keys.
    """
    sentence, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, row, begin, stop, first, end = sentence, sentence, 0, queries, 0, keys
    if cu_q is not None:
        b, row = sentence * 0, sentence * 0
        begin, stop = tl.load(cu_q + sentence), tl.load(cu_q + sentence + 1)
        first, end = tl.load(cu_k + sentence), tl.load(cu_k + sentence + 1)
    counters = (row * tl.num_programs(1) + h) * queries
    lse, delta = lse + counters, delta + counters
    q, k, v = _head(q, strides_q, b, h), _head(k, strides_k, b, h), _head(v, strides_v, b, h)
    do, o = _head(do, strides_do, b, h), _head(o, strides_o, b, h)
    dq, dk, dv = _head(dq, strides_dq, b, h), _head(dk, strides_dk, b, h), _head(dv, strides_dv, b, h)
    if mask is not None:
        mask = _head(mask, strides_mask, b, h)
    if bias is not None:
        bias = _head(bias, strides_bias, b, h)
    if distance is not None:
        distance += h * (2 * reach + 1)
    # Where a group of the mask's counters begins. Rows have more boundaries than sentences: no block without keys.
    start = tl.where(first == end, end, first // 32 * 32)
    shift = end - stop

    fits = True
    if cu_q is not None:
        fits = stop - begin <= BM
    if fits:
        rows = begin + tl.arange(0, BM)
        q_tile, do_tile, lse_rows, hidden, delta_rows = _queries_of_sentence(
            q, do, o, lse, rows, stop, features, strides_q, strides_do, strides_o, BD
        )
        dq_sum = tl.zeros((BM, BD), tl.float32)
        for at in range(start, end, BN):
            cols = at + tl.arange(0, BN)
            k_tile, v_tile = _rows(k, strides_k, cols, end, features, BD), _rows(v, strides_v, cols, end, features, BD)
            dropped, ds = _score_gradients(
                q_tile, k_tile, v_tile, do_tile, lse_rows, hidden, delta_rows, mask, bias, distance, seed,
                _seen(cols, first, cu_q), rows, cols, shift, counters + rows, stop, end, columns, at,
                strides_mask, strides_bias, reach, scale, threshold, keep_scale, CAUSAL, DROPOUT,
            )  # fmt: skip
            inside = (cols >= first) & (cols < end)
            dv_sum = tl.dot(tl.trans(dropped.to(do_tile.dtype)), do_tile, input_precision="ieee")
            _store_rows(dv, strides_dv, dv_sum * keep_scale, cols, inside, features, BD)
            ds = ds.to(q_tile.dtype)
            dk_sum = tl.dot(tl.trans(ds), q_tile, input_precision="ieee")
            _store_rows(dk, strides_dk, dk_sum * scale, cols, inside, features, BD)
            dq_sum = tl.dot(ds, k_tile, dq_sum, input_precision="ieee")
        _store_rows(dq, strides_dq, dq_sum * scale, rows, rows < stop, features, BD)
    else:
        for at in range(begin, stop, BM):
            rows = at + tl.arange(0, BM)
            q_tile, do_tile, lse_rows, hidden, delta_rows = _queries_of_sentence(
                q, do, o, lse, rows, stop, features, strides_q, strides_do, strides_o, BD
            )
            tl.store(delta + rows, delta_rows, mask=rows < stop)
            last = end
            if CAUSAL:
                last = min(end, at + BM + shift)
            dq_sum = tl.zeros((BM, BD), tl.float32)
            for at_key in range(start, last, BN):
                dq_sum = _add_query_gradient(
                    dq_sum, q_tile, do_tile, lse_rows, hidden, delta_rows, k, v, None, None, distance, seed, at_key,
                    rows, tl.zeros_like(rows) + first, tl.zeros_like(rows) + end, shift, counters + rows, stop, end,
                    features, columns, 0, strides_k[2], strides_v[2], strides_mask, strides_bias, reach, scale,
                    threshold, keep_scale, CAUSAL, DROPOUT, BN, BD,
                )  # fmt: skip
            _store_rows(dq, strides_dq, dq_sum * scale, rows, rows < stop, features, BD)
        tl.debug_barrier()  # every thread's delta is there
        for at in range(start, end, BN):
            cols = (at + tl.arange(0, BN)).to(tl.int64)
            k_tile, v_tile = _rows(k, strides_k, cols, end, features, BD), _rows(v, strides_v, cols, end, features, BD)
            dk_sum, dv_sum = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
            from_query = begin
            if CAUSAL:  # the block of the first query that sees the first of these keys
                from_query += max(at - shift - begin, 0) // BM * BM
            for at_query in range(from_query, stop, BM):
                dk_sum, dv_sum = _add_key_gradients(
                    dk_sum, dv_sum, k_tile, v_tile, q, do, lse, delta, None, None, distance, seed, at_query, cols,
                    None, None, shift, counters, stop, end, features, columns, at, strides_q[2], strides_do[2],
                    strides_mask, strides_bias, reach, scale, threshold, keep_scale, CAUSAL, DROPOUT, BM, BD,
                )  # fmt: skip
            inside = (cols >= first) & (cols < end)
            _store_rows(dk, strides_dk, dk_sum * scale, cols, inside, features, BD)
            _store_rows(dv, strides_dv, dv_sum * keep_scale, cols, inside, features, BD)


@triton.jit
def _seen(cols, first, cu):
    """The keys that are not before `first`, which is 0 but in packed rows."""
    if cu is None:
        return None
    else:
        return (cols >= first)[None, :]


@triton.jit
def _rows(x, strides, rows, stop, features, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return load(x + rows[:, None].to(tl.int64) * strides[2] + d[None, :], rows < stop, d < features)


@triton.jit
def _store_rows(x, strides, tile, rows, inside, features, BD: tl.constexpr):
    d = tl.arange(0, BD)
    store(x + rows[:, None].to(tl.int64) * strides[2] + d[None, :], tile, inside, d < features)


@triton.jit
def _queries_of_sentence(
    q, do, o, lse, rows, stop, features, strides_q, strides_do, strides_o, BD: tl.constexpr
):  # fmt: skip
    """A block of queries, with do, lse, its hidden score (_load_lse) and delta."""
    inside = rows < stop
    q_tile = _rows(q, strides_q, rows, stop, features, BD)
    do_tile = _rows(do, strides_do, rows, stop, features, BD)
    o_tile = _rows(o, strides_o, rows, stop, features, BD)
    lse_rows, hidden = _load_lse(lse + rows, inside)
    return q_tile, do_tile, lse_rows, hidden, tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)


@triton.jit(do_not_specialize=["threshold"])
def _distance_gradient_kernel(
    partials, do, lse, delta, q, k, v, mask, bias, seed, cu_q, cu_k, distance, sentences, reach,
    heads, queries, keys, features, prefix, first, columns, tiles,
    strides_do, strides_q, strides_k, strides_v, strides_mask, strides_bias, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BITS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dS of one head, summed over the pairs at each of BR distances, in every so manieth block of queries.

    It makes the scores near BR diagonals again. The first and the last distance have all pairs beyond them too.
    """
    h = tl.program_id(1).to(tl.int64)
    nearest, d, places = tl.program_id(0) * BR - reach, tl.arange(0, BD), tl.arange(0, BR)
    distance += h * (2 * reach + 1)
    sums = tl.zeros((BR,), tl.float32)
    blocks = tl.cdiv(queries, BM)
    for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
        b = (tile // blocks).to(tl.int64)
        rows = (tile % blocks * BM + tl.arange(0, BM)).to(tl.int64)
        inside = rows < queries
        counters = (b * heads + h) * queries + rows
        q_tile = load(_head(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], inside, d < features)
        do_tile = load(_head(do, strides_do, b, h) + rows[:, None] * strides_do[2] + d[None, :], inside, d < features)
        lse_rows, hidden = _load_lse(lse + counters, inside)
        delta_rows = tl.load(delta + counters, mask=inside, other=0.0)
        k_head, v_head, mask_head, bias_head = _head(k, strides_k, b, h), _head(v, strides_v, b, h), mask, bias
        if mask is not None:
            mask_head = _head(mask, strides_mask, b, h)
        if bias is not None:
            bias_head = _head(bias, strides_bias, b, h)

        begins, ends, shift = _span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
        begin, stop = _keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
        if nearest > -reach:
            begin = max(begin, tl.min(rows[:, None] + shift).to(tl.int32) + nearest) // BN * BN
        if nearest + BR <= reach:
            stop = min(stop, tl.max(rows[:, None] + shift).to(tl.int32) + nearest + BR)
        for start in range(begin, stop, BN):
            cols = start + tl.arange(0, BN)
            k_tile = load(k_head + cols[:, None] * strides_k[2] + d[None, :], cols < keys, d < features)
            v_tile = load(v_head + cols[:, None] * strides_v[2] + d[None, :], cols < keys, d < features)
            seen = None
            if begins is not None:
                seen = (cols[None, :] >= begins[:, None]) & (cols[None, :] < ends[:, None])
            _, ds = _score_gradients(
                q_tile, k_tile, v_tile, do_tile, lse_rows, hidden, delta_rows, mask_head, bias_head, distance, seed,
                seen, rows, cols, shift, counters, queries, keys, columns, first + start,
                strides_mask, strides_bias, reach, scale, threshold, keep_scale, CAUSAL, DROPOUT,
            )  # fmt: skip
            steps = _steps(rows, cols, shift, reach)
            for i in range(BR):  # unrolled, all of these sums would want registers at the same time
                found = tl.sum(tl.where(steps == nearest + i, ds, 0.0))
                sums += tl.where(places == i, found, 0.0)
    at = nearest + reach + places
    place = (tl.program_id(2).to(tl.int64) * heads + h) * (2 * reach + 1)
    tl.store(partials + place + at, sums, mask=at < 2 * reach + 1)
