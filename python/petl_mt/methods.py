"""``petl-mt methods``: for each ``--method`` the tensors that it trains, and its settings for ``--method-arg``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from petl_kernels.methods import METHODS, Variant

WIDTH = 80

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
        yield from _wrapped(f"{name}: {variant.trains}", "", "  ")
        yield f"  learning rate {variant.config.learning_rate:g} at width 1024, more for narrower models (--lr)"
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
    kind = str(field.type).removesuffix(" | None")
    meaning = field.metadata.get("meaning", "")
    return f"{field.name}={_word(_default(variant, field))}  ({KINDS.get(kind, kind)}{solved}) {meaning}"


def _default(variant: Variant, field: dataclasses.Field) -> Any:
    if field.name in variant.settings:
        return variant.settings[field.name]
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _word(value: Any) -> str:
    """Returns the value as ``--method-arg`` takes it, which is read as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(text: str, first: str, other: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options."""


def run_command(arguments: argparse.Namespace) -> None:
    print("\n".join(overview()))
