"""``petl-mt methods``: for each ``--method`` the tensors that it trains, and its settings for ``--method-arg``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from petl_kernels.methods import METHODS, Variant

from .config import LEARNING_RATES

WIDTH = 80

TRAINS = {
    "full": "every tensor of the model",
    "adapter": "a bottleneck (down, activation, up) behind each layer",
    "adapter-sublayer": "a bottleneck behind each attention and each feed-forward block",
    "pfeiffer": "a bottleneck behind each layer, through the layer's own last norm",
    "parallel": "a bottleneck beside each feed-forward block",
    "lora": "a low-rank change of linear layers: q and v of every attention",
    "bitfit": "all biases, and the weights of the norms",
    "bitfit-biases": "all biases",
    "cross-attention": "the decoder's cross-attentions, whole, with their norms",
    "prefix": "keys and values before those of every attention",
    "ia3": "a factor on keys, values and the feed-forward blocks' hidden units",
    "ln": "weights and biases of the norms",
}

# setting -> meaning; with the method before it where it differs there
SETTINGS = {
    "bottleneck": "units of the bottleneck",
    "placement": "layer or sublayer: behind each layer, or each block in it",
    "parallel": "beside the feed-forward block, not behind the layer",
    "pfeiffer": "through the layer's own norm",
    "activation": "relu, gelu or silu",
    "scale": "factor on the adapter's result; null: 4 for parallel, else 1",
    "rank": "rank of the change",
    "alpha": "the change counts alpha / rank",
    "dropout": "share of the adapter's inputs that is dropped",
    "targets": "names of modules, or a regular expression for paths; null: those above",
    "lora targets": "names of modules, a regular expression for paths, or all-linear; null: those above",
    "rank_pattern": "other ranks, by a regular expression for the path's end",
    "alpha_pattern": "other alphas, the same way",
    "rslora": "the change counts alpha / square root of rank",
    "bias": "none, or lora_only: the targets' biases are trained, too",
    "layer_norm": "the norms' weights are trained, too",
    "length": "keys and values that stand before an attention's own",
    "feedforward": "targets whose input is scaled; null: the last linear of a block",
}

KINDS = {
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "str": "word",
    "tuple[str, ...] | str": "list or word",
    "dict[str, int]": "mapping",
    "dict[str, float]": "mapping",
}


def overview() -> Iterator[str]:
    """Yields lines of at most ``WIDTH`` columns: each method and its settings with type and default."""
    for name, variant in METHODS.items():
        yield from _wrapped(f"{name}: {TRAINS[name]}", "", "  ")
        yield f"  learning rate {LEARNING_RATES[name]:g} at width 1024, more for narrower models (--lr)"
        for field in dataclasses.fields(variant.config):
            yield from _wrapped(_setting(variant, field), "  ", "      ")
        yield ""
    yield from _wrapped(
        "A setting is given as --method-arg NAME=VALUE, lists and mappings as in YAML: targets=[q_proj,v_proj]. "
        "Where one says so, --params solves it: --params 10% or --params 2M.",
        "",
        "",
    )


def _setting(variant: Variant, field: dataclasses.Field) -> str:
    solved = ", solved by --params" if field.name == variant.config.size_field else ""
    kind = KINDS[str(field.type).removesuffix(" | None")]
    meaning = SETTINGS.get(f"{variant.config.method} {field.name}", SETTINGS[field.name])
    return f"{field.name}={_word(_default(variant, field))}  ({kind}{solved}) {meaning}"


def _default(variant: Variant, field: dataclasses.Field) -> Any:
    if field.name in variant.settings:
        return variant.settings[field.name]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _word(value: Any) -> str:
    """Returns the value as ``--method-arg`` takes it, which is read as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(text: str, first: str, other: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options."""


def run_command(arguments: argparse.Namespace) -> None:
    print("\n".join(overview()))
