"""The launches of lean layers and of a whole training step, put together from the counts of their ops.

A layer of tier 1 with its norms in front, LoRA on q and v and its weights in a border, as `layers/rule` runs it on a
card: each op's launches both ways, and the sums of gradients between them. A step has the layers of both sides, the
norms at their ends and the vocabulary loss. Embeddings and the optimiser's update of some millions of parameters are
left out.
"""

from __future__ import annotations

from dataclasses import replace

from bench.predict import counts
from bench.predict.counts import Counts
from bench.shapes import MODELS, Shape, shape

RANK = 16
SENTENCE = 128  # tokens of a sentence of a packed row, which attention's work follows from
Part = tuple[str, Counts]  # the op, "" for a sum of gradients that is no op of ours


def encoder_layer(s: Shape, tokens: int, size: int = 2) -> list[Part]:
    return [*_first_norm(s, tokens, size), *_attention(s, tokens, size), *_network(s, tokens, size)]


def decoder_layer(s: Shape, tokens: int, source: int, size: int = 2) -> list[Part]:
    own, cross = _attention(s, tokens, size), _cross_attention(s, tokens, source, size)
    return [*_first_norm(s, tokens, size), *own, *cross, *_network(s, tokens, size)]


def total(parts: list[Part]) -> Counts:
    return counts.total(counted for _, counted in parts)


def step(name: str, source: int, target: int, chunk_bytes: int, size: int = 2) -> dict[str, Counts]:
    """The parts of a step of a model of ``shapes.MODELS``: its encoder, its decoder and its loss."""
    layers, s = MODELS[name][0], shape(name, "cuda")
    ends = [counts.layer_norm(tokens, s.d, size) for tokens in (source, target)]
    return {
        "encoder": counts.total([*[total(encoder_layer(s, source, size))] * layers, ends[0]]),
        "decoder": counts.total([*[total(decoder_layer(s, target, source, size))] * layers, ends[1]]),
        "loss": counts.linear_cross_entropy(target, s.d, s.words, size, chunk_bytes),
    }


def _first_norm(s: Shape, t: int, size: int) -> list[Part]:
    """The norm at the layer's start, to whose gradient that of the residual is added in the same pass."""
    norm, residual = counts.layer_norm(t, s.d, size), t * s.d * size
    forward, backward = norm.launched()
    kernels = forward, replace(backward, bytes=backward.bytes + residual)
    return [("layer_norm", replace(norm, bytes=norm.bytes + residual, kernels=kernels))]


def _attention(s: Shape, t: int, size: int) -> list[Part]:
    d = s.heads * s.head_dim
    qkv = counts.lora_border(t, s.d, [d, d, d], [RANK, 0, RANK], size)
    return [("lora_border", qkv), _input_again(s, t, size), *_scores(s, t, t, size), *_out(s, t, size)]


def _cross_attention(s: Shape, t: int, source: int, size: int) -> list[Part]:
    """q of the target, k and v of the source, whose gradient is added to those of the other layers."""
    d = s.heads * s.head_dim
    q = counts.lora_border(t, s.d, [d], [RANK], size)
    kv = counts.lora_border(source, s.d, [d, d], [0, RANK], size)
    more = ("", counts.streams(3, source * s.d, size))
    return [
        ("lora_border", q),
        _input_again(s, t, size),
        ("lora_border", kv),
        more,
        *_scores(s, t, source, size),
        *_out(s, t, size),
    ]


def _input_again(s: Shape, t: int, size: int) -> Part:
    """Returns the pass that makes the adapters' input again in backward, from the norm's statistics."""
    return "layer_norm_from_statistics", replace(counts.streams(2, t * s.d, size), bytes=0)


def _scores(s: Shape, t: int, source: int, size: int) -> list[Part]:
    """Attention with dropout of sentences of SENTENCE tokens a side, in packed rows."""
    sentences, boundaries = t // SENTENCE, 4 * (t + source)
    pairs = sentences * (t // sentences) * (source // sentences)
    heads = s.heads, t, source, s.head_dim
    return [("attention", counts.attention(1, *heads, size, boundaries, pairs, sentences, dropout=True))]


def _out(s: Shape, t: int, size: int) -> list[Part]:
    """The output projection, and the sum with the norm of the next block."""
    out = counts.frozen_linear(t, s.d, s.heads * s.head_dim, size)
    return [("frozen_linear", out), ("dropout_add_norm", counts.dropout_add_norm(t, s.d, size))]


def _network(s: Shape, t: int, size: int) -> list[Part]:
    ffn = counts.frozen_ffn(t, s.d, s.ffn, "relu", False, size)
    return [("frozen_ffn", ffn), ("dropout_add", counts.dropout_add(t, s.d, size))]
