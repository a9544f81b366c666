"""Shapes of translation models by name, and which of them a device runs.

A GPU runs every size that a model has, once, with 8,192 tokens. A CPU runs 512 tokens of `CPU_SHAPES` alone: NLLB-600M
(mBART's layers are of the same size), NLLB-3.3B for the widest linears, and T5 base, whose width is no power of two.
What else would show a CPU little (fp32, other ranks and bottlenecks) it runs at NLLB-600M's size alone, and
torch.compile, which compiles for longer than all else runs, in the main case of each op at that size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Width of the model, width of its feed-forward block, heads, width of a head, words, tokens in a batch."""

    d: int
    ffn: int
    heads: int
    head_dim: int
    words: int
    tokens: int


# A CPU gets batches that fit its patience, a GPU batches that fill it.
TOKENS = {"cpu": 512, "cuda": 8192}

# BART family: layers of each side, width, feed-forward width, heads, words.
MODELS = {
    "m2m-418m": (12, 1024, 4096, 16, 128112),
    "mbart": (12, 1024, 4096, 16, 250054),
    "nllb-600m": (12, 1024, 4096, 16, 256206),
    "nllb-1.3b": (24, 1024, 8192, 16, 256206),
    "nllb-3.3b": (24, 2048, 8192, 16, 256206),
}
# T5 family, gated GELU: the same, and the width of a head, which need not be d / heads. The widths of madlad-10b are
# those that add up to its published 10.7 billion parameters.
T5_MODELS = {
    "t5": (12, 768, 2048, 12, 32128, 64),
    "madlad-3b": (32, 1024, 8192, 16, 256000, 128),
    "madlad-10b": (32, 2048, 16384, 16, 256000, 256),
}
# A shape of no model: the width of LoRA's third target.
WIDE = {"wide": (1, 4096, 16384, 32, 256206)}
# m2m-418m has nllb-600m's layers and half its words: what a CPU's vocabulary loss has time for.
NAMES = ["nllb-600m", "nllb-1.3b", "nllb-3.3b", "mbart", *T5_MODELS]
CPU_SHAPES = ("nllb-600m", "nllb-3.3b", "t5", "m2m-418m")


def shape(name: str, device: str) -> Shape:
    _, d, ffn, heads, words, *rest = {**MODELS, **T5_MODELS, **WIDE}[name]
    return Shape(d, ffn, heads, rest[0] if rest else d // heads, words, TOKENS[device])


def distinct(*fields: str) -> list[str]:
    """Returns the first name of each combination of these fields that a model has, "gated" among them."""
    first = {}
    for name in NAMES:
        values = {**vars(shape(name, "cuda")), "gated": name in T5_MODELS}
        first.setdefault(tuple(values[field] for field in fields), name)
    return list(first.values())


def runs_on(name: str, device: str) -> bool:
    return device != "cpu" or name in CPU_SHAPES


def config(name: str):
    """Returns the config of a whole model, one of MODELS or T5_MODELS."""
    if name in T5_MODELS:
        return t5_config(*T5_MODELS[name], tie_word_embeddings=False, decoder_start_token_id=0)
    if name != "mbart":
        return m2m_config(*MODELS[name])
    from transformers import MBartConfig

    return MBartConfig(**_bart(*MODELS[name]), activation_function="relu")


def m2m_config(layers: int, d: int, ffn: int, heads: int, words: int, **settings):
    """Returns a config of M2M-100 or NLLB; dropout as they train, and no layer is dropped."""
    from transformers import M2M100Config

    return M2M100Config(**_bart(layers, d, ffn, heads, words), **settings)


def _bart(layers: int, d: int, ffn: int, heads: int, words: int) -> dict:
    sides = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn, "layerdrop": 0.0}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    dropout = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return {"vocab_size": words, "d_model": d, **both, **dropout}


def t5_config(layers: int, d: int, ffn: int, heads: int, words: int, head_dim: int, **settings):
    """Returns a config of T5 v1.1 or MADLAD-400; dropout as they train."""
    from transformers import T5Config

    widths = {"d_model": d, "d_ff": ffn, "d_kv": head_dim, "num_heads": heads, "vocab_size": words}
    depth = {"num_layers": layers, "num_decoder_layers": layers}
    return T5Config(**widths, **depth, feed_forward_proj="gated-gelu", dropout_rate=0.1, **settings)
