"""Counts of whole layers and steps: work that no implementation can avoid."""

from __future__ import annotations

from bench.predict.counts.elementwise import attention
from bench.predict.counts.linears import frozen_linear
from bench.predict.counts.work import Counts


def layer(side: str, rows: int, length: int, d: int, ffn: int, heads: int, head_dim: int, gated: bool, size: int):
    """A frozen layer's forward and input gradients: its linears, its attentions, and the stream between blocks.

    Bytes: each weight twice, and for each linear and attention its activations once each way.
    """
    t, inner = rows * length, heads * head_dim
    attentions = 2 if side == "decoder" else 1
    scores = attention(rows, heads, length, length, head_dim, size)
    projections = frozen_linear(t, inner, d, size, bias=False)
    blocks = attentions * (8 * t * inner * d * 2 + scores.flops)
    moved = attentions * (4 * projections.bytes + scores.bytes)
    weights = 3 if gated else 2
    linears = weights * frozen_linear(t, ffn, d, size, bias=False).bytes
    return Counts(blocks + 4 * weights * t * d * ffn, moved + linears)


def step(layers: int, source: int, target: int, d: int, ffn: int, words: int, size: int) -> Counts:
    """Source and target tokens through the frozen linears of a BART-family model and its output projection.

    Forward and input gradients; attention's own products are left out, as they are where work is planned.
    """
    of_source = layers * (6 * d * d + 2 * d * ffn)  # the decoder's keys and values of the source among them
    of_target = layers * (6 * d * d + 2 * d * ffn) + words * d
    return Counts(4 * (source * of_source + target * of_target), 2 * size * (of_source + of_target))
