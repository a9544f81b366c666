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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, takes_room
from petl_kernels.ops import philox
from petl_kernels.ops.attention_checks import check, check_boundaries, check_distance_bias, check_packed
from petl_kernels.ops.attention_reference import empty_outputs, like_heads, reads_without_waiting
from petl_kernels.ops.define import accumulate_dtype, define, differentiate
from petl_kernels.ops.room import roomy


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
    """Returns softmax(scale · q kᵀ + bias + mask) v; q (B, H, Lq, D), k and v (B, H, Lk, D) -> (B, H, Lq, D).

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
    check(q, k, v, mask, bias, dropout, seed, prefix_k, prefix_v)
    check_packed(q, k, mask, bias, cu_seqlens_q, cu_seqlens_k)
    check_distance_bias(distance_bias, q)
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


def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is not None and reads_without_waiting(cu_seqlens_q):
        assert cu_seqlens_k is not None
        check_boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[2])
        check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[2])
    kernel = dispatch("attention", q.device, backend, q.dtype)
    return kernel(
        q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_seqlens_q, cu_seqlens_k, distance_bias
    )


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q)


def _backward(
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
    backend: str,
    rooms: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Returns the gradients; ``rooms``: free columns behind the rows of [dq dk dv], or of dq and of [dk dv]."""
    kernel = dispatch("attention_backward", q.device, backend, q.dtype)
    arguments = (
        do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
        cu_seqlens_q, cu_seqlens_k, distance_bias, need_ddistance_bias,
    )  # fmt: skip
    into = _side_by_side(q, k, v, rooms) if rooms else None
    if into is not None and takes_room(kernel, q.dtype):
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
    """Returns empty tensors like q, k and v, in the columns of one matrix with room behind its rows, or of two."""
    together = ([q, k, v],) if len(rooms) == 1 else ([q], [k, v])
    return [part for own, room in zip(together, rooms, strict=True) for part in _columns(own, room)]


def _columns(like: list[Tensor], room: int) -> list[Tensor]:
    batch, heads, length, features = like[0].shape
    rows = roomy(like[0], (batch, length, len(like) * heads * features), room)
    return [torch.unflatten(part, 2, (heads, features)).transpose(1, 2) for part in rows.chunk(len(like), 2)]


def _backward_fake(
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
    backend: str,
    rooms: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    sums = accumulate_dtype(q.dtype)
    prefix = (0, q.shape[1], q.shape[3]) if prefix_k is None else prefix_k.shape
    dbias = q.new_empty(bias.shape if need_dbias and bias is not None else 0, dtype=sums)
    dprefix = (q.new_empty(prefix, dtype=sums) for _ in range(2))
    distances = distance_bias.shape if need_ddistance_bias and distance_bias is not None else 0
    ddistance = q.new_empty(distances, dtype=sums)
    grads = _side_by_side(q, k, v, rooms) if rooms else map(like_heads, (q, k, v))
    return (*grads, dbias, *dprefix, ddistance)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    q, k, v, mask, bias, prefix_k, prefix_v, ctx.causal, ctx.scale, ctx.dropout, seed, *packed, ctx.backend = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, mask, bias, prefix_k, prefix_v, seed, *packed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, needs: Sequence[Any], do: Tensor | None, _: Any) -> tuple[Any, ...]:
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
