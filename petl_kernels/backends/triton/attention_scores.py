"""Scores of attention and their gradients, as Triton's forward and backward kernels share them.

In a packed row each block finds the sentences of its queries (or keys) on the device, and walks over the keys (queries)
from the first to the last of them, with a mask where sentences meet.

An additive mask's finfo.min absorbs the score it is added to: of n keys that all have it, each gets 1/n. Their lse
would lose log n, so it is kept as a factor: such a query's lse is HIDDEN · (1 + log n).
"""

# A type checker cannot follow ``@triton.jit``: to it, kernels and ``tl.range`` never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.backends.triton.common import keep_probabilities

HIDDEN = tl.constexpr(-1e30)  # the score of a key that an additive mask hides with so much or more
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(pointer, strides, b, h):
    return pointer + b * strides[0] + h * strides[1]


@triton.jit
def span_across(cu, cu_other, tokens, length, sentences, BITS: tl.constexpr):
    """Returns where each token's sentence begins and ends on the other side, and by how much further its end is there.

    A search in the boundaries finds the sentence, so the host need not read them."""
    tokens = tl.minimum(tokens, length - 1)
    sentence = tl.zeros_like(tokens)
    for i in tl.static_range(BITS):
        after = sentence + (1 << (BITS - 1 - i))
        begins = tl.load(cu + after, mask=after < sentences, other=2147483647)
        sentence = tl.where(begins <= tokens, after, sentence)
    begin, end = tl.load(cu_other + sentence), tl.load(cu_other + sentence + 1)
    return begin, end, end - tl.load(cu + sentence + 1)


@triton.jit
def steps_behind(rows, cols, shift, reach):
    """Returns how far each key is behind each query, at most `reach`, in 32 bits: 64 would take twice the registers."""
    steps = cols[None, :].to(tl.int32) - rows[:, None].to(tl.int32) - shift
    return tl.minimum(tl.maximum(steps, -reach), reach)


@triton.jit
def block_scores(
    q, k, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach, scale,
    hidden, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Returns S of a block of queries and a block of keys, `hidden` where an additive mask hides a key.

    mask, bias and distance point to the head. Query i is level with key i + shift; seen: the pairs of one sentence,
    None where all are.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (rows < queries)[:, None] & (cols < keys)[None, :]
    if bias is not None:
        pointers = bias + rows[:, None] * strides_bias[2] + cols[None, :] * strides_bias[3]
        s += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if distance is not None:
        s += tl.load(distance + (reach + steps_behind(rows, cols, shift, reach))).to(tl.float32)
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
def exp(x):
    """Returns exp(x), with 0 for numbers under 2^-126: four instructions fewer than tl.exp, which keeps them."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def span_of_queries(cu_q, cu_k, rows, queries, keys, sentences, BITS: tl.constexpr):
    """Returns where the keys that each query sees begin and end, and the key that query 0 would be level with.

    In a packed row each is a column of numbers; elsewhere the bounds are None and the key is one number.
    """
    if cu_q is None:
        return None, None, keys - queries
    else:
        begins, ends, shift = span_across(cu_q, cu_k, rows, queries, sentences, BITS)
        return begins, ends, shift[:, None]


@triton.jit
def keys_to_walk(rows, begins, ends, shift, queries, keys, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Returns the first of the keys that a block's queries see, rounded down to a multiple of BN, and their end."""
    begin, stop = 0, keys
    if begins is not None:
        begin, stop = tl.min(begins) // BN * BN, tl.max(ends)
    if CAUSAL:
        stop = min(stop, tl.max(rows[:, None] + shift).to(tl.int32) + 1)
    return begin, stop


@triton.jit
def load_lse(pointers, inside):
    """Returns lse, and the score `hidden` that keys hidden by an additive mask count with."""
    lse = tl.load(pointers, mask=inside, other=float("inf"))
    sees_hidden = lse <= HIDDEN
    return tl.where(sees_hidden, lse / HIDDEN - 1, lse), tl.where(sees_hidden, 0.0, -float("inf"))


@triton.jit
def score_gradients(
    q, k, v, do, lse, hidden, delta, mask, bias, distance, seed, seen, rows, cols, shift, counters, queries, keys,
    columns, first, strides_mask, strides_bias, reach, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Returns what is kept of P, not scaled, and dS for a block of queries and one of keys, which begins at `first`."""
    s = block_scores(
        q, k, mask, bias, distance, seen, rows, cols, shift, queries, keys, strides_mask, strides_bias, reach, scale,
        hidden[:, None], CAUSAL,
    )  # fmt: skip
    p = exp(s - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    dropped = p
    if DROPOUT:
        kept = keep_probabilities(seed, counters, first, columns, threshold, p.shape[1])
        dropped = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp, 0.0)
    return dropped, p * (dp * keep_scale - delta[:, None])
