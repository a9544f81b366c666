"""``petl-mt study``: several methods and budgets of parameters on one language pair."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS

from ..commands.options import FILES, add_fields, add_languages
from ..config import Pair, TrainConfig, check_keys, is_short
from ..config_file import LANGUAGE_KEYS, each_once, load_yaml
from ..terminal import say
from .grid import GRID, Entry, StudyConfig, parse_grid
from .rows import Row
from .run import run_study, title
from .tables import cells, notes, print_table, table_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    study = parser.add_argument_group("study")
    told = "the options of petl-mt train, and grid, test, lr; flags go on top (default: none)"
    study.add_argument("--config", metavar="FILE.yaml", help=told)
    study.add_argument("--model", metavar="DIR|ID", help="checkpoint folder or hub id: the parent of all rows")
    study.add_argument("--out", metavar="DIR", help="folder of the study; finished rows in it are not run again")
    default = " ".join(GRID).replace("%", "%%")
    told = f"methods, each with the budgets of its rows (default: {default})"
    study.add_argument("--grid", nargs="+", metavar="METHOD[=BUDGET,...]", help=told)
    told = "highest learning rates of some methods, such as adapter=2e-3 (default: by method and width)"
    study.add_argument("--lr", nargs="+", metavar="METHOD=RATE", help=told)

    text = parser.add_argument_group("text")
    add_fields(text, "train", "valid")
    text.add_argument("--test", help="two text files that every row is scored on", **FILES)
    add_languages(text)
    add_fields(text, "max_length", "bleu_tokenize")

    loop = parser.add_argument_group("training of each row")
    add_fields(loop, "steps", "batch_tokens", "accumulate", "schedule", "warmup", "label_smoothing", "dropout")
    add_fields(loop, "clip", "seed", "eval_every", "patience", "beam", "memory", "tier", "precision")


def run_command(arguments: argparse.Namespace) -> int:
    config = study_config(arguments)
    rows = run_study(config, on_row=_say)
    print_table(table_console(), rows, title(config))
    print(f"written: {config.base.out}/study.md, study.json, study.png")
    return 2 if any(row.status == "failed" for row in rows) else 0


def _say(row: Row) -> None:
    say("\n".join(notes([row])) or "  ".join(filter(None, cells(row))))


def study_config(arguments: argparse.Namespace) -> StudyConfig:
    """Returns the study of --config, with flags on top. Raises InputError for settings without an effect on it, too."""
    values, where = (load_yaml(arguments.config), arguments.config) if arguments.config else ({}, "flags")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    flags = {key: value for key, value in vars(arguments).items() if value is not None}
    if "lr" in flags:
        flags["lr"] = each_once("lr", map(_rate, flags["lr"]))
    values.update({key: value for key, value in flags.items() if key not in ("command", "config")})
    for key, instead in (("method", "grid"), ("params", "grid: method=budget,..."), ("plan", "memory")):
        if values.get(key) is not None:
            raise InputError(f"{where}: {key} {values[key]!r}: no effect on a study; expected {instead}")
    grid, rates, test = values.pop("grid", GRID), values.pop("lr", None) or {}, values.pop("test", None)
    if isinstance(grid, str) or not all(isinstance(item, str) for item in grid or ()):
        raise InputError(f"{where}: grid {grid!r}: expected a list such as [full, 'adapter=10%,1%']")
    base = TrainConfig.from_dict(values, where)
    return StudyConfig(base, _test_pair(test, values, where), grid or (), _rates(rates, parse_grid(grid or ()), where))


def _test_pair(test: Any, values: Mapping[str, Any], where: str) -> Pair:
    """Returns the pair of ``[SRC, TGT]`` with the languages beside it, or of a list of one mapping."""
    if test is None:
        raise InputError("test: not given; expected a source file and a target file")
    if not isinstance(test, list):
        raise InputError(f"{where}: test {test!r}: expected two files")
    languages = {key: values[key] for key in LANGUAGE_KEYS if key in values} if is_short(test) else {}
    try:
        pairs = check_keys({"train": test, **languages}, where)["train"]
    except InputError as error:
        raise InputError(str(error).replace(f"{where}: train", f"{where}: test")) from None
    if len(pairs) != 1:
        raise InputError(f"{where}: test: {len(pairs)} pairs; expected one, which every row is scored on")
    return pairs[0]


def _rates(rates: Any, entries: Sequence[Entry], where: str) -> dict[str, float]:
    """Returns rates by method. Raises InputError for what is no rate, and for a method that has no row."""
    if not isinstance(rates, Mapping):
        raise InputError(f"{where}: lr {rates!r}: expected a rate for each method, such as adapter: 2.0e-3")
    result = {}
    for method, rate in rates.items():
        try:
            result[method] = float("nan" if isinstance(rate, bool) else rate)
        except (TypeError, ValueError):
            result[method] = math.nan
        if not 0 < result[method] < math.inf:
            raise InputError(f"{where}: lr {method}={rate}: expected a rate above 0, such as {method}=2e-3")
        if method in METHODS and method not in {entry.method for entry in entries}:
            raise InputError(f"{where}: lr {method}={rate}: no effect, since the grid has no {method}")
    return result


def _rate(text: str) -> tuple[str, str]:
    method, equals, rate = text.partition("=")
    if not (method and equals and rate):
        raise InputError(f"lr {text!r}: expected METHOD=RATE, such as adapter=2e-3")
    return method, rate
