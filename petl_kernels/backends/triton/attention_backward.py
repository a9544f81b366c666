"""The backward kernels of attention.

_sentence_gradients_kernel      dq, dk and dv of one head of a short sentence
_query_gradient_kernel          dq by blocks of queries, and delta for the others
_key_gradients_kernel           dk and dv by blocks of keys, of a prefix too
_distance_gradient_kernel       the gradient of a bias by distance, by blocks of distances
"""

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.backends.triton.attention_scores import (
    head_of,
    keys_to_walk,
    load_lse,
    score_gradients,
    span_across,
    span_of_queries,
    steps_behind,
)
from petl_kernels.backends.triton.common import load, store


@triton.jit
def _add_query_gradient(
    acc, q, do, lse, hidden, delta, k, v, mask, bias, distance, seed, start, rows, begins, ends, shift, counters,
    queries, keys, features, columns, first, stride_k, stride_v, strides_mask, strides_bias, reach, scale, threshold,
    keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Returns acc + dS k for one block of keys."""
    cols, d = start + tl.arange(0, BN), tl.arange(0, BD)
    k_tile = load(k + cols[:, None] * stride_k + d[None, :], cols < keys, d < features)
    v_tile = load(v + cols[:, None] * stride_v + d[None, :], cols < keys, d < features)
    seen = None
    if begins is not None:
        seen = (cols[None, :] >= begins[:, None]) & (cols[None, :] < ends[:, None])
    _, ds = score_gradients(
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
    q_tile = load(head_of(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], inside, d < features)
    do_tile = load(head_of(do, strides_do, b, h) + rows[:, None] * strides_do[2] + d[None, :], inside, d < features)
    o_tile = load(head_of(o, strides_o, b, h) + rows[:, None] * strides_o[2] + d[None, :], inside, d < features)
    lse_rows, hidden = load_lse(lse + counters, inside)
    delta_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + counters, delta_rows, mask=inside)
    k, v = head_of(k, strides_k, b, h), head_of(v, strides_v, b, h)
    if mask is not None:
        mask = head_of(mask, strides_mask, b, h)
    if bias is not None:
        bias = head_of(bias, strides_bias, b, h)
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
    begins, ends, shift = span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
    begin, stop = keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
    for start in range(begin, stop, BN):
        acc = _add_query_gradient(
            acc, q_tile, do_tile, lse_rows, hidden, delta_rows, k, v, mask, bias, distance, seed, start,
            rows, begins, ends, shift, counters, queries, keys, features, columns, first,
            strides_k[2], strides_v[2], strides_mask, strides_bias, reach, scale, threshold, keep_scale,
            CAUSAL, DROPOUT, BN, BD,
        )  # fmt: skip
    dq_head = head_of(dq, strides_dq, b, h)
    store(dq_head + rows[:, None] * strides_dq[2] + d[None, :], acc * scale, inside, d < features)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q, do, lse, delta, mask, bias, distance, seed, start, cols, begins, ends, shift, counters,
    queries, keys, features, columns, first, stride_q, stride_do, strides_mask, strides_bias, reach, scale, threshold,
    keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Returns dk + dSᵀ q and dv + drop(P)ᵀ do, for the queries from `start` on that are before `queries`."""
    rows, d = start + tl.arange(0, BM), tl.arange(0, BD)
    inside = rows < queries
    q_tile = load(q + rows[:, None] * stride_q + d[None, :], inside, d < features)
    do_tile = load(do + rows[:, None] * stride_do + d[None, :], inside, d < features)
    lse_rows, hidden = load_lse(lse + rows, inside)
    delta_rows = tl.load(delta + rows, mask=inside, other=0.0)
    seen = None
    if begins is not None:
        seen = (rows[:, None] >= begins[None, :]) & (rows[:, None] < ends[None, :])
    dropped, ds = score_gradients(
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
    """Writes dk and dv of a block of keys, which are columns first to first + keys of the scores' rows."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    cols, d = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64), tl.arange(0, BD)
    k_tile = load(head_of(k, strides_k, b, h) + cols[:, None] * strides_k[2] + d[None, :], cols < keys, d < features)
    v_tile = load(head_of(v, strides_v, b, h) + cols[:, None] * strides_v[2] + d[None, :], cols < keys, d < features)
    q, do = head_of(q, strides_q, b, h), head_of(do, strides_do, b, h)
    if mask is not None:
        mask = head_of(mask, strides_mask, b, h)
    if bias is not None:
        bias = head_of(bias, strides_bias, b, h)
    if distance is not None:
        distance += h * (2 * reach + 1)

    dk_sum, dv_sum = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    begin, stop, shift, begins, ends = 0, queries, keys - queries, None, None
    if cu_q is not None:
        begins, ends, back = span_across(cu_k, cu_q, cols, keys, sentences, BITS)
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
    dk_head, dv_head = head_of(dk, strides_dk, b, h), head_of(dv, strides_dv, b, h)
    store(dk_head + cols[:, None] * strides_dk[2] + d[None, :], dk_sum * scale, cols < keys, d < features)
    store(dv_head + cols[:, None] * strides_dv[2] + d[None, :], dv_sum * keep_scale, cols < keys, d < features)


@triton.jit(do_not_specialize=["threshold"])
def _sentence_gradients_kernel(
    dq, dk, dv, delta, do, o, lse, q, k, v, mask, bias, seed, cu_q, cu_k, distance, reach,
    queries, keys, features, columns, strides_dq, strides_dk, strides_dv, strides_do, strides_o,
    strides_q, strides_k, strides_v, strides_mask, strides_bias, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes dq, dk and dv of one head of a sentence, a row of the batch or a part of a packed row.

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
    q, k, v = head_of(q, strides_q, b, h), head_of(k, strides_k, b, h), head_of(v, strides_v, b, h)
    do, o = head_of(do, strides_do, b, h), head_of(o, strides_o, b, h)
    dq, dk, dv = (
        head_of(dq, strides_dq, b, h),
        head_of(dk, strides_dk, b, h),
        head_of(dv, strides_dv, b, h),
    )
    if mask is not None:
        mask = head_of(mask, strides_mask, b, h)
    if bias is not None:
        bias = head_of(bias, strides_bias, b, h)
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
            dropped, ds = score_gradients(
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
        tl.debug_barrier()  # every thread has stored its delta
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
    """Returns which keys are not before `first`, None where none is: outside of packed rows."""
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
    """Returns a block of queries, with do, lse, its hidden score (load_lse) and delta."""
    inside = rows < stop
    q_tile = _rows(q, strides_q, rows, stop, features, BD)
    do_tile = _rows(do, strides_do, rows, stop, features, BD)
    o_tile = _rows(o, strides_o, rows, stop, features, BD)
    lse_rows, hidden = load_lse(lse + rows, inside)
    return q_tile, do_tile, lse_rows, hidden, tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)


@triton.jit(do_not_specialize=["threshold"])
def _distance_gradient_kernel(
    partials, do, lse, delta, q, k, v, mask, bias, seed, cu_q, cu_k, distance, sentences, reach,
    heads, queries, keys, features, prefix, first, columns, tiles,
    strides_do, strides_q, strides_k, strides_v, strides_mask, strides_bias, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BITS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes dS of one head, summed over the pairs at each of BR distances, in one of `parts` blocks of queries.

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
        q_tile = load(head_of(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], inside, d < features)
        do_tile = load(head_of(do, strides_do, b, h) + rows[:, None] * strides_do[2] + d[None, :], inside, d < features)
        lse_rows, hidden = load_lse(lse + counters, inside)
        delta_rows = tl.load(delta + counters, mask=inside, other=0.0)
        k_head, v_head, mask_head, bias_head = (
            head_of(k, strides_k, b, h),
            head_of(v, strides_v, b, h),
            mask,
            bias,
        )
        if mask is not None:
            mask_head = head_of(mask, strides_mask, b, h)
        if bias is not None:
            bias_head = head_of(bias, strides_bias, b, h)

        begins, ends, shift = span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
        begin, stop = keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
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
            _, ds = score_gradients(
                q_tile, k_tile, v_tile, do_tile, lse_rows, hidden, delta_rows, mask_head, bias_head, distance, seed,
                seen, rows, cols, shift, counters, queries, keys, columns, first + start,
                strides_mask, strides_bias, reach, scale, threshold, keep_scale, CAUSAL, DROPOUT,
            )  # fmt: skip
            steps = steps_behind(rows, cols, shift, reach)
            for i in range(BR):  # unrolled, all of these sums would want registers at the same time
                found = tl.sum(tl.where(steps == nearest + i, ds, 0.0))
                sums += tl.where(places == i, found, 0.0)
    at = nearest + reach + places
    place = (tl.program_id(2).to(tl.int64) * heads + h) * (2 * reach + 1)
    tl.store(partials + place + at, sums, mask=at < 2 * reach + 1)
