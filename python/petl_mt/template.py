"""A YAML file for ``petl-mt train --config`` with every option: its help and default as comments above it.

    python -m petl_mt.template > train.yaml

Options that ``EXAMPLE`` sets are there with its value, all others at their default behind "#", so that a user takes the
mark away. Names, defaults and texts are those of the fields of ``TrainConfig``: none is written twice.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from petl_kernels.methods import METHODS

from .config import OF_A_NEW_MODEL, TrainConfig

WIDTH = 110
# Adapts the model that ships with the package to dates as its text writes them, offline, in the sources' folder.
EXAMPLE: dict[str, Any] = {
    "model": "python/petl_mt/demo/parent",
    "out": "runs/example",
    "train": ["examples/text/train.en", "examples/text/train.de"],
    "valid": ["examples/text/valid.en", "examples/text/valid.de"],
    "src_lang": "en",
    "tgt_lang": "de",
    "method": "adapter",
    "params": "5%",
    "steps": 40,
    "batch_tokens": 1024,
    "max_length": 64,
    "lr": 0.005,
    "beam": 2,
}
HEAD = """Options of `petl-mt train --config FILE`, written by `python -m petl_mt.template`. Flags go on top.
A name behind "#" is an option at its default; null stands for the default that its comment names."""

LANGUAGE = "language of the {side} text, such as en, sw or swh_Latn; not where each pair of train names its own"


def template() -> str:
    """Returns the text of the file: one option for each field of ``TrainConfig``, and the two languages."""
    lines = [*_comment(HEAD)]
    for name, (text, default) in _options().items():
        lines += ["", *_comment(text), f"{'' if name in EXAMPLE else '#'}{_setting(name, default)}"]
    return "\n".join(lines) + "\n"


def _options() -> dict[str, tuple[str, Any]]:
    """Returns name -> (what it means, its default) of all options, in the order of the fields."""
    options: dict[str, tuple[str, Any]] = {}
    for field in dataclasses.fields(TrainConfig):
        default = getattr(TrainConfig(), field.name)
        options[field.name] = _meaning(field, default), default
        if field.name == "valid":  # beside the text that they are the languages of
            options["src_lang"] = LANGUAGE.format(side="source"), None
            options["tgt_lang"] = LANGUAGE.format(side="target"), None
    return options


def _meaning(field: dataclasses.Field, default: Any) -> str:
    """Returns the option's help with its default in words, where the value itself does not say it."""
    text, metavar, words = (field.metadata[name] for name in ("help", "metavar", "default"))
    text = text.replace("{methods}", ", ".join(METHODS))
    if re.fullmatch(r"[a-z0-9]+\|[a-z0-9|]+", str(metavar)):
        text = f"{metavar.replace('|', ' or ')}: {text}"
    if field.name in OF_A_NEW_MODEL:
        text = f"of a new model: {text}"
    shown = words or ("" if default in ("", None, []) else _yaml(default))
    return f"{text} (default: {shown})" if shown else text


def _comment(text: str) -> Iterator[str]:
    """Yields the lines of a comment, with options named as in the file: batch_tokens for --batch-tokens."""
    flags = (f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig))
    text = re.sub("|".join(flags), lambda flag: flag[0][2:].replace("-", "_"), text)
    for line in text.splitlines():
        yield from textwrap.wrap(line, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _setting(name: str, default: Any) -> str:
    return f"{name}: {_yaml(EXAMPLE.get(name, default))}"


def _yaml(value: Any) -> str:
    """Returns the value on one line, as YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    print(template(), end="")
