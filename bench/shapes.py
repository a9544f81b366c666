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

# Layers of each side, width, feed-forward width, heads, their width, words. The widths of the 10B model are those that
# add up to its published 10.7B parameters; its config was not at hand.
MADLAD = {
    "madlad-3b": (32, 1024, 8192, 16, 128, 256000),
    "madlad-10b": (32, 2048, 16384, 16, 256, 256000),
}


def config(name: str):
    """Of one of MODELS, MADLAD, or "mbart" (mBART-50)."""
    if name in MADLAD:
        return madlad_config(*MADLAD[name])
    if name != "mbart":
        return m2m_config(*MODELS[name])
    from transformers import MBartConfig

    return MBartConfig(**_bart(12, 1024, 4096, 16, 250054), activation_function="relu")


def madlad_config(layers: int, d: int, ffn: int, heads: int, d_kv: int, words: int):
    """Of MADLAD-400, a T5 1.1 whose output projection is not its embedding."""
    from transformers import T5Config

    sizes = {"d_model": d, "d_ff": ffn, "d_kv": d_kv, "num_heads": heads, "num_layers": layers}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1}
    return T5Config(vocab_size=words, num_decoder_layers=layers, decoder_start_token_id=0, **sizes, **kind)


def m2m_config(layers: int, d: int, ffn: int, heads: int, words: int, **settings):
    """Of M2M-100 and NLLB; dropout as they train, and no layer is dropped."""
    from transformers import M2M100Config

    return M2M100Config(**_bart(layers, d, ffn, heads, words), **settings)


def _bart(layers: int, d: int, ffn: int, heads: int, words: int) -> dict:
    sides = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn, "layerdrop": 0.0}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    dropout = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return {"vocab_size": words, "d_model": d, **both, **dropout}


def shape(name: str, device: str) -> Shape:
    d, ffn = WIDTHS[name]
    return Shape(d, ffn, TOKENS[device])
