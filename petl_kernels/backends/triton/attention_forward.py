"""The forward kernel of attention: a block of queries walks over the prefix and its keys with one online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.backends.triton.attention_scores import (
    HIDDEN,
    block_scores,
    exp,
    head_of,
    keys_to_walk,
    span_of_queries,
)
from petl_kernels.backends.triton.common import keep_probabilities, load, store


@triton.jit
def _attend(
    acc, largest, total, q, k, v, mask, bias, distance, seed, start, rows, begins, ends, shift, counters, queries, keys,
    features, columns, first, stride_k, stride_v, strides_mask, strides_bias, reach, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Returns one step of the online softmax: acc = Σ drop(exp(S - largest)) v, largest, total = Σ exp(S - largest)."""
    cols, d = start + tl.arange(0, BN), tl.arange(0, BD)
    k_tile = load(k + cols[:, None] * stride_k + d[None, :], cols < keys, d < features)
    seen = None
    if begins is not None:
        seen = (cols[None, :] >= begins[:, None]) & (cols[None, :] < ends[:, None])
    s = block_scores(
        q, k_tile, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach,
        scale, HIDDEN, CAUSAL,
    )  # fmt: skip
    new = tl.maximum(largest, tl.max(s, 1))
    offset = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    p = exp(s - offset[:, None])
    shrink = exp(largest - offset)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        kept = keep_probabilities(seed, counters, first + start, columns, threshold, BN)
        p = tl.where(kept, p, 0.0)
    v_tile = load(v + cols[:, None] * stride_v + d[None, :], cols < keys, d < features)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total


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
    q_tile = load(head_of(q, strides_q, b, h) + rows[:, None] * strides_q[2] + d[None, :], rows < queries, d < features)
    k, v = head_of(k, strides_k, b, h), head_of(v, strides_v, b, h)
    if mask is not None:
        mask = head_of(mask, strides_mask, b, h)
    if bias is not None:
        bias = head_of(bias, strides_bias, b, h)
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
    begins, ends, shift = span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS)
    begin, stop = keys_to_walk(rows, begins, ends, shift, queries, keys, BN, CAUSAL)
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
    store(head_of(o, strides_o, b, h) + rows[:, None] * strides_o[2] + d[None, :], acc, rows < queries, d < features)
    tl.store(lse + counters, tl.where(blind, float("inf"), value), mask=rows < queries)
