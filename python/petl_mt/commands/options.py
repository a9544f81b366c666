"""Flags for the fields of ``TrainConfig``, and those that several commands share.

A flag that is not given leaves None, so that a value from a file stays; the default is told in the flag's help.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..config import TrainConfig

FILES = {"nargs": 2, "metavar": ("SRC", "TGT")}
PAIR = {"nargs": 3, "action": "append", "metavar": ("SRC-TGT", "SRC", "TGT")}
KINDS: dict[str, dict[str, Any]] = {  # annotation of a field -> argparse's settings
    "int": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "bool": {"action": "store_true"},
    "bool | None": {"action": "boolean"},
    "list[Pair]": {"nargs": 2},
    "list[str]": {"nargs": "+"},
    "tuple[float, float]": {"nargs": 2, "type": float},
}


def add_fields(group: argparse._ArgumentGroup, *names: str) -> None:
    """Adds the flags of the fields ``names`` of ``TrainConfig`` to ``group``, in that order."""
    from petl_kernels.methods import METHODS  # here: it loads PyTorch, which most commands' help does without

    fields, defaults = {field.name: field for field in dataclasses.fields(TrainConfig)}, vars(TrainConfig())
    for name in names:
        field = fields[name]
        default = field.metadata["default"] or _shown(defaults[name])
        text = field.metadata["help"].replace("{methods}", ", ".join(METHODS)).replace("%", "%%")
        text += f" (default: {default})" if default else ""
        group.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **_settings(field))


def _settings(field: dataclasses.Field) -> dict[str, Any]:
    annotation = str(field.type)
    settings = dict(KINDS.get(annotation) or KINDS.get(annotation.removesuffix(" | None"), {}))
    if field.metadata["joined"]:
        settings = {"type": _names}
    if field.metadata["metavar"]:
        settings["metavar"] = field.metadata["metavar"]
    return settings


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _shown(value: Any) -> str:
    if value in (None, "", []):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_languages(group: argparse._ArgumentGroup, default: str = "") -> None:
    """Adds ``--src-lang`` and ``--tgt-lang``; default: the default in words."""
    shown = f" (default: {default})" if default else ""
    for flag, side in (("--src-lang", "source"), ("--tgt-lang", "target")):
        group.add_argument(flag, metavar="CODE", help=f"language of the {side}, such as en, sw or swh_Latn{shown}")


def add_run(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds a finished run and the options of its search; returns the group of text."""
    run = parser.add_argument_group("run")
    add_run_folder(run)
    text = parser.add_argument_group("text")
    add_languages(text, "that of the run, where it has one pair")
    search = parser.add_argument_group("search")
    search.add_argument("--beam", type=int, metavar="N", help="beams; more are slower (default: the run's --beam)")
    told = "longest source and translation, in tokens; longer sources are cut, and counted (default: the run's)"
    search.add_argument("--max-length", type=int, metavar="N", help=told)
    told = "tokens of a batch, padding and beams included (default: the run's)"
    search.add_argument("--batch-tokens", type=int, metavar="N", help=told)
    told = "bytes that all of it may take, such as 8GiB (default: the run's)"
    search.add_argument("--memory", metavar="SIZE", help=told)
    told = "host memory that weights may be counted with beside a CUDA device (default: the run's, or what is free)"
    search.add_argument("--host-memory", metavar="SIZE", help=told)
    return text


def add_run_folder(group: argparse._ArgumentGroup) -> None:
    """Adds ``--run``."""
    group.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="the --out of a training run")


def search_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``add_run`` has added as keyword arguments of ``Translator``."""
    names = ("src_lang", "tgt_lang", "beam", "max_length", "batch_tokens", "memory", "host_memory")
    return {name: getattr(arguments, name) for name in names}
