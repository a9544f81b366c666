"""The table of a study: Markdown for its file, columns for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from petl_kernels.units import format_size

from .rows import Row

# name -> the cell of a row, and whether it stands in the terminal's table, which has 80 columns
COLUMNS: dict[str, tuple[Callable[[Row], str], bool]] = {
    "method": (lambda row: row.name, True),
    "trained": (lambda row: _number(row.trained_parameters, ","), False),
    "share": (lambda row: _share(row.trained_share), True),
    "BLEU": (lambda row: _number(row.scores and row.scores.bleu, ".1f"), True),
    "chrF": (lambda row: _number(row.scores and row.scores.chrf, ".1f"), True),
    "s/step": (lambda row: _number(row.seconds_per_step, ".3g"), True),
    "B/token": (lambda row: _number(row.saved_bytes_per_token, ",.0f"), True),
    "memory": (lambda row: _size(row.peak_memory_bytes), True),
    "process": (lambda row: _size(row.peak_process_bytes), True),
    "lr": (lambda row: _number(row.lr, ".2g"), True),
}
WORDS = "memory: what --memory counts; process: host memory, Python included"
NARROW = tuple(name for name, (_, shown) in COLUMNS.items() if shown)
WIDTH = 80


def cells(row: Row, columns: Sequence[str] = tuple(COLUMNS)) -> tuple[str, ...]:
    """Returns the row as text, one string a column."""
    if row.status != "done":
        return (row.name, *["-"] * (len(columns) - 1))  # ``notes`` has the reason
    return tuple(COLUMNS[name][0](row) for name in columns)


def facts(rows: Sequence[Row]) -> list[str]:
    """Returns the lines below the table."""
    return [*notes(rows), WORDS, *signatures(rows)]


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each row without figures, with the reason."""
    return [f"{row.name}: {row.status}: {row.note}" for row in rows if row.status != "done"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(value: int | None) -> str:
    return "" if value is None else format_size(value)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share in (0, 1) else f"{share:.2%}"


def signatures(rows: Sequence[Row]) -> list[str]:
    """Returns sacreBLEU's signatures and the number of test sentences."""
    scores = next((row.scores for row in rows if row.scores), None)
    if scores is None:
        return []
    return [f"BLEU {scores.bleu_signature}", f"chrF {scores.chrf_signature}", f"{scores.sentences} test sentences"]


def markdown(rows: Sequence[Row], heading: str, about: Mapping[str, Any]) -> str:
    """Returns the table as Markdown; about: the machine, see ``machine``."""
    lines = [f"# {heading}", "", f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", *(f"- {line}" for line in [*facts(rows), ", ".join(f"{k} {v}" for k, v in about.items())])]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], heading: str):
    """Returns the rows as a rich table of at most ``WIDTH`` columns."""
    from rich.box import SIMPLE  # here: drawn for a terminal only
    from rich.table import Table

    result = Table(title=heading, box=SIMPLE, show_edge=False, pad_edge=False, padding=0)
    for column in NARROW:
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(*cells(row, NARROW), style=None if row.status == "done" else "dim")
    return result


def print_table(console, rows: Sequence[Row], heading: str) -> None:
    """Prints the table, and below it the missing rows, the meaning of its bytes, and the scores' signatures."""
    console.print(table(rows, heading))
    for line in facts(rows):
        console.print(line, soft_wrap=len(line) <= WIDTH, markup=False)


def table_console():
    """Returns the console for ``print_table``: the terminal, or ``WIDTH`` columns of a file."""
    from rich.console import Console  # here: drawn for a terminal only

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
