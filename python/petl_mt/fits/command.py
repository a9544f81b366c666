"""``petl-mt fits``: which models fit which cards, in what way, and how fast they would train."""

from __future__ import annotations

import argparse
import shlex

from petl_kernels.files import atomic_write

from ..checks import check_file
from ..commands.options import add_fields
from ..config import TrainConfig

SETTINGS = ("max_length", "batch_tokens", "allow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Plans for cards that need not be here; no weights and no text. Tokens a second are predictions."
    )
    what = parser.add_argument_group("rows")
    told = "a name of the table such as nllb-600m, a config.json, a folder or a hub id; again for each (default: all "
    told += "names)"
    what.add_argument("--model", action="append", metavar="NAME|DIR|ID", help=told)
    told = "a card such as 'RTX 3060', or all; again for each (default: the card here, or T4)"
    what.add_argument("--card", action="append", metavar="NAME", help=told)
    told = "what is trained; again for each (default: lora and adapter)"
    what.add_argument("--method", action="append", metavar="NAME", help=told)
    run = parser.add_argument_group("training")
    add_fields(run, *SETTINGS)
    result = parser.add_argument_group("result")
    told = "write the rows there as a page, too (default: none)"
    result.add_argument("--markdown", metavar="FILE", help=told)


def run_command(arguments: argparse.Namespace) -> None:
    from ..study.machine import machine  # here: transformers, which --help does without
    from .rows import METHODS, MODELS, cards_named, plan_rows
    from .tables import heading, line, page

    if arguments.markdown:
        check_file("markdown", arguments.markdown, [])
    settings = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    cards, models = cards_named(arguments.card or []), arguments.model or list(MODELS)
    print(heading(), flush=True)
    rows = []
    for row in plan_rows(cards, models, TrainConfig(**settings), arguments.method or METHODS):
        print(line(row), flush=True)
        rows.append(row)
    if arguments.markdown:
        order = {card: i for i, card in enumerate(cards)}
        rows.sort(key=lambda row: order[row.card])
        with atomic_write(arguments.markdown) as file:
            file.write(page(rows, command(arguments), machine()))
        print(f"written: {arguments.markdown}")


def command(arguments: argparse.Namespace) -> str:
    """Returns the command that ``arguments`` were parsed from, flags in the order of the help."""
    words = ["petl-mt", "fits"]
    for name in ("model", "card", "method"):
        words += [word for value in getattr(arguments, name) or [] for word in (f"--{name}", value)]
    for name in (*SETTINGS, "markdown"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)
