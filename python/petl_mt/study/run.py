"""A study: every run of its grid, each in a process of its own, and the three files.

Every entry of the grid is one run of ``train`` in ``OUT/rows/<entry>``; the adapter that it leaves is loaded again and
scored on the test text. A row that is finished is not run again, one that was interrupted goes on. Each row has a
process of its own, so that no row's memory counts for another, and keeps the budget where there is one. A row that
fails, such as one whose method does not fit into ``--memory``, is named in the table with the reason, and the others
run; the next call tries it again.

    OUT/study.md     the table, with signatures, machine and versions
    OUT/study.json   the same for programs
    OUT/study.png    BLEU against trained parameters
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write
from petl_kernels.interop.hf import load_skeleton
from petl_kernels.methods import METHODS, parse_budget

from ..checks import check_folder
from ..data import read_pair
from ..json_file import write_json
from ..own_process import in_own_process
from ..runs.lock import locked
from ..silence import hush
from ..terminal import say
from .grid import Entry, StudyConfig
from .machine import machine
from .plot import plot
from .rows import Row, finished_row, parent_row, run
from .tables import markdown


def run_study(config: StudyConfig, quiet: bool = False, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Runs what is not finished yet and writes the three files; returns the rows, the parent's own first.

    on_row: is called with each row when it is there. Raises InputError for what a user can mend, before the first run.
    Rows run in processes of their own, so a script calls this under ``if __name__ == "__main__"``.
    """
    entries = config.entries()
    for method in config.lr:
        if method not in METHODS:
            raise InputError(f"lr: unknown method {method!r}, expected one of {', '.join(METHODS)}")
    text = read_pair(config.test)
    for entry in entries:
        config.for_entry(entry).check()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        write_study(config, rows)
        if on_row:
            on_row(row)

    with hush():
        model, _ = load_skeleton(config.base.model)  # the sizes of methods need no weights
        problems = {entry: _unreachable(model, entry) for entry in entries}
    check_folder("out", config.base.out)
    Path(config.base.out).mkdir(parents=True, exist_ok=True)
    with locked(Path(config.base.out), "study"):
        with _telling_interrupts(config, None):
            add(finished_row(config, None) or in_own_process(parent_row, config, text, quiet))
        for entry in entries:
            if problems[entry]:
                add(Row(entry.method, entry.params, "unreachable", problems[entry]))
                continue
            with _telling_interrupts(config, entry):
                add(finished_row(config, entry) or _row_or_why_not(config, entry, text, quiet))
    return rows


@contextmanager
def _telling_interrupts(config: StudyConfig, entry: Entry | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted in {config.folder(entry)}, whose process has ended; the same command goes on there")
        raise


def _row_or_why_not(config: StudyConfig, entry: Entry, text: tuple, quiet: bool) -> Row:
    """Returns a failed row for a method that cannot run, so that those after it do; the next call tries it again."""
    try:
        return in_own_process(run, config, entry, text, quiet)
    except InputError as error:
        return Row(entry.method, entry.params, "failed", str(error), seed=config.base.seed)


def _unreachable(model, entry: Entry) -> str:
    """Returns why the method cannot have this budget on ``model``; empty where it can."""
    try:
        if entry.params is not None:
            METHODS[entry.method].for_budget(model, parse_budget(entry.params))
    except InputError as error:
        return str(error).rpartition("; ")[2]
    return ""


def write_study(config: StudyConfig, rows: Sequence[Row]) -> None:
    """Writes the table, the same for programs, and the plot of the rows so far."""
    out = Path(config.base.out)
    about = machine()
    write_json(
        out / "study.json",
        {
            "pair": config.test.name,
            "model": config.base.model,
            "seed": config.base.seed,
            "grid": list(config.grid),
            "lr": dict(config.lr),
            "config": config.base.to_dict(),
            "test": dataclasses.asdict(config.test),
            "machine": about,
            "rows": [row.to_dict() for row in rows],
        },
    )
    with atomic_write(out / "study.md") as file:
        file.write(markdown(rows, title(config), about))
    plot(rows, out / "study.png", title(config))


def title(config: StudyConfig) -> str:
    """Returns the heading of a study's table and plot."""
    base = config.base
    return f"{config.test.name}, {base.steps:,} steps of {base.batch_tokens:,} tokens, seed {base.seed}"
