"""The launches of lean layers and of a whole training step, put together from the counts of their ops.

A layer of tier 1 with its norms in front and LoRA on q and v, as `layers/rule` runs it: each op's launches both ways,
and the sums of gradients between them. A step has the layers of both sides, the norms at their ends and the vocabulary
loss. Embeddings, casts of adapters and the optimiser's update of some millions of parameters are left out.
"""

from __future__ import annotations

import counts
from counts import Counts
from shapes import MODELS, Shape, shape

RANK = 16
SENTENCE = 128  # tokens of a sentence of a packed row, which attention's work follows from


def encoder_layer(s: Shape, tokens: int, size: int = 2) -> Counts:
    return counts.total([_first_norm(s, tokens, size), *_attention_block(s, tokens, size), *_network(s, tokens, size)])


def decoder_layer(s: Shape, tokens: int, source: int, size: int = 2) -> Counts:
    own, cross = _attention_block(s, tokens, size), _cross_attention_block(s, tokens, source, size)
    return counts.total([_first_norm(s, tokens, size), *own, *cross, *_network(s, tokens, size)])


def step(name: str, source: int, target: int, chunk_bytes: int, size: int = 2) -> dict[str, Counts]:
    """The parts of a step of a model of ``shapes.MODELS``: its encoder, its decoder and its loss."""
    layers, s = MODELS[name][0], shape(name, "cuda")
    ends = [counts.layer_norm(tokens, s.d, size) for tokens in (source, target)]
    return {
        "encoder": counts.total([*[encoder_layer(s, source, size)] * layers, ends[0]]),
        "decoder": counts.total([*[decoder_layer(s, target, source, size)] * layers, ends[1]]),
        "loss": counts.linear_cross_entropy(target, s.d, s.words, size, chunk_bytes),
    }


def _first_norm(s: Shape, t: int, size: int) -> Counts:
    """The norm at the layer's start, and the sum of its gradient with that of the residual."""
    return counts.layer_norm(t, s.d, size) + counts.streams(3, t * s.d, size)


def _attention_block(s: Shape, t: int, size: int) -> list[Counts]:
    d = s.heads * s.head_dim
    qkv = counts.lora_linear(t, s.d, [d, d], [RANK, RANK], size) + counts.frozen_linear_library(t, d, s.d, size)
    return [qkv, counts.streams(3, t * s.d, size), *_scores(s, t, t, size), *_out(s, t, size)]


def _cross_attention_block(s: Shape, t: int, source: int, size: int) -> list[Counts]:
    """q of the target, k and v of the source; the source's gradients of k, of v and of the layers are added up."""
    d = s.heads * s.head_dim
    q, v = (counts.lora_linear(tokens, s.d, [d], [RANK], size) for tokens in (t, source))
    k = counts.frozen_linear_library(source, d, s.d, size)
    sums = [counts.streams(3, source * s.d, size)] * 2
    return [q, v, k, *sums, *_scores(s, t, source, size), *_out(s, t, size)]


def _scores(s: Shape, t: int, source: int, size: int) -> list[Counts]:
    sentences = max(t, source) // SENTENCE
    boundaries = 4 * (t + source)
    pairs = t // sentences * (source // sentences) * sentences
    return [counts.attention(1, s.heads, t, source, s.head_dim, size, boundaries, pairs)]


def _out(s: Shape, t: int, size: int) -> list[Counts]:
    """The output projection, and the sum with the norm of the next block."""
    out = counts.frozen_linear_library(t, s.d, s.heads * s.head_dim, size)
    return [out, counts.dropout_add_norm(t, s.d, size)]


def _network(s: Shape, t: int, size: int) -> list[Counts]:
    return [counts.frozen_ffn(t, s.d, s.ffn, "relu", False, size), counts.dropout_add(t, s.d, size)]
