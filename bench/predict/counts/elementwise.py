"""Counts of what lies between the products: activations, dropout, norms and attention."""

from __future__ import annotations

import math

from bench.predict.counts.tables import ROW_PARTS, SENTENCE
from bench.predict.counts.work import FP32, MASK, Counts, Launch

# Instructions a thread spends on an element, counted for sm_90: forward and backward.
ACTIVATION = {"relu": (8.5, 9.5), "gated relu": (10.5, 17.5)}
DROPOUT_ADD = (18.4, 15.8)
ATTENTION = {False: (12.7, 19.2), True: (21.6, 30.7)}  # each score, without dropout and with it


def activation(t: int, f: int, kind: str, size: int, dropout: bool = False) -> Counts:
    """z in, y out; dy in, dz out. relu keeps a bit an element, the others z."""
    elements = t * f
    kept = t * math.ceil(f / 8)
    written = kept if kind == "relu" else 0
    read = kept if kind == "relu" else elements * size
    forward, backward = 2 * elements * size + written, 2 * elements * size + read
    work = [(each + (MASK if dropout else 0)) * elements for each in ACTIVATION["relu"]]
    kernels = (
        Launch("_activation_kernel", bytes=forward, instructions=work[0]),
        Launch("_activation_backward_kernel", bytes=backward, instructions=work[1]),
    )
    return Counts(0, forward + backward, kernels)


def gated_activation(t: int, f: int, size: int, dropout: bool = False) -> Counts:
    """act(z) ⊙ g: three arrays forward, five backward."""
    array = t * f * size
    work = [(each + (MASK if dropout else 0)) * t * f for each in ACTIVATION["gated relu"]]
    kernels = (
        Launch("_gated_kernel", bytes=3 * array, instructions=work[0]),
        Launch("_gated_backward_kernel", bytes=5 * array, instructions=work[1]),
    )
    return Counts(0, 8 * array, kernels)


def dropout_add(t: int, d: int, size: int) -> Counts:
    array = t * d * size
    kernels = (
        Launch("_dropout_add_kernel", bytes=3 * array, instructions=DROPOUT_ADD[0] * t * d),
        Launch("_dropout_add_kernel", bytes=2 * array, instructions=DROPOUT_ADD[1] * t * d),
    )
    return Counts(0, 5 * array, kernels)


def dropout_add_norm(t: int, d: int, size: int, trained: bool = False, centred: bool = True) -> Counts:
    """y and the residual in, h and u out; du, h and the residual's gradient in, that of h and of y out."""
    parameters = 2 if centred else 1
    array, rows, sums = t * d * size, FP32 * parameters * t, FP32 * parameters * d
    forward, backward = 4 * array + rows + parameters * d * size, 5 * array + rows + d * size
    work = [each * t * d for each in DROPOUT_ADD]
    kernels = [
        Launch("_sum_norm_kernel", bytes=forward, instructions=work[0]),
        Launch("_norm_backward_kernel", bytes=backward + trained * ROW_PARTS * sums, instructions=work[1]),
    ]
    if trained:
        kernels.append(Launch("_sum_kernel", bytes=(ROW_PARTS + 1) * sums))
        backward += sums
    return Counts(0, forward + backward, tuple(kernels))


def layer_norm(t: int, d: int, size: int, trained: bool = False) -> Counts:
    """Parameters of the activations' dtype; their gradients come as fp32 sums."""
    return _norm(t, d, size, trained, parameters=2, statistics=2)


def rms_norm(t: int, d: int, size: int, trained: bool = False) -> Counts:
    return _norm(t, d, size, trained, parameters=1, statistics=1)


def _norm(t: int, d: int, size: int, trained: bool, parameters: int, statistics: int) -> Counts:
    x, rows = t * d * size, FP32 * statistics * t
    forward = 2 * x + rows + parameters * d * size
    backward = 3 * x + rows + d * size
    sums = FP32 * parameters * d if trained else 0
    kernels = [
        Launch("_norm_kernel", bytes=forward),
        Launch("_norm_backward_kernel", bytes=backward + ROW_PARTS * sums),
    ]
    if trained:
        kernels.append(Launch("_sum_kernel", bytes=(ROW_PARTS + 1) * sums))
        backward += sums
    return Counts(0, forward + backward, tuple(kernels))


def attention(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, size: int, mask: int = 0, pairs: int = 0,
    sentences: int = 0, dropout: bool = False,
) -> Counts:  # fmt: skip
    """Two products forward, four backward; ours makes the scores again in backward, twice where sentences are long.

    ``mask``: its bytes, or those of a packed row's boundaries. ``pairs``: those of a query and a key in one sentence,
    of ``sentences``, where ``queries`` and ``keys`` are a packed row's.
    """
    scores = batch * heads * (pairs or queries * keys)
    product = 2 * scores * head_dim
    q, kv = batch * heads * queries * head_dim * size, 2 * batch * heads * keys * head_dim * size
    lse = FP32 * batch * heads * queries
    forward = 2 * q + kv + lse + mask
    backward = 3 * q + kv + lse + mask + q + kv  # do, q, o, k, v in; dq, dk, dv out
    work = [each * scores for each in ATTENTION[dropout]]
    kernels = [Launch("_attention_kernel", 2 * product, forward, work[0])]
    wide = head_dim > 64
    if size < FP32 and batch * queries <= (sentences or batch) * SENTENCE and not (sentences and wide):
        kernels.append(Launch("_sentence_gradients_kernel", 5 * product, backward, work[1]))
    else:
        kernels.append(Launch("_query_gradient_kernel", 3 * product, 4 * q + kv + 2 * lse + mask, work[1]))
        kernels.append(Launch("_key_gradients_kernel", 4 * product, 2 * q + 2 * kv + 2 * lse + mask, work[1]))
    return Counts(6 * product, forward + backward, tuple(kernels))
