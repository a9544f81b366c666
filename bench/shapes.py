"""Shapes of the frozen linears and adapters, named after the models that have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Width of the model, width of its feed-forward, tokens in a batch."""

    d: int
    ffn: int
    tokens: int


# A CPU gets batches that fit its patience, a GPU batches that fill it.
TOKENS = {"cpu": 512, "cuda": 8192}
WIDTHS = {
    "nllb-600m": (1024, 4096),
    "nllb-3.3b": (2048, 8192),
    "t5-base": (768, 2048),
}
# Width of the model, words of its output projection.
VOCABULARIES = {"m2m-418m": (1024, 128112), "nllb-600m": (1024, 256206)}

# Layers of each side, width, feed-forward width, heads, words.
MODELS = {
    "m2m-418m": (12, 1024, 4096, 16, 128112),
    "nllb-600m": (12, 1024, 4096, 16, 256206),
    "nllb-1.3b": (24, 1024, 8192, 16, 256206),
    "nllb-3.3b": (24, 2048, 8192, 16, 256206),
}


def m2m_config(layers: int, d: int, ffn: int, heads: int, words: int, **settings):
    """Of M2M-100 and NLLB; dropout as they train, and no layer is dropped."""
    from transformers import M2M100Config

    sides = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn, "layerdrop": 0.0}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    dropout = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return M2M100Config(vocab_size=words, d_model=d, **both, **dropout, **settings)


def shape(name: str, device: str) -> Shape:
    d, ffn = WIDTHS[name]
    return Shape(d, ffn, TOKENS[device])
