"""The progress of work on standard error: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

EVERY = 10.0  # seconds between two lines


def say(line: str) -> None:
    """Prints a line to standard error.

    A reader that has gone (``2>&1 | tee``, which Ctrl-C ends first) ends no work. Where standard error is closed the
    line is dropped, since ``print`` would take None for standard output.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


_say = say  # under a name that no parameter has


class Watch:
    """Shows progress: ``with Watch("score", 500, "lines") as watch: ... watch.at(20)``.

    total: None where it is not known; the time left is then not shown. quiet: shows nothing. say: prints a line; None
    is standard error. Work that is done within ``EVERY`` seconds leaves no line, and a bar is wiped away at its end.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        quiet: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.say = say or _say
        self._bar = self._task = None
        self._with_bar = say is None
        self._began = self._said = time.monotonic()
        self._told = 0

    def __enter__(self) -> Watch:
        self._began = self._said = time.monotonic()
        if not self.quiet and self._with_bar and on_terminal():
            self._bar = new_bar(transient=True)
            self._task = self._bar.add_task(self.what, total=self.total, figures=self.unit)
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, figures: str = "") -> None:
        """Shows that ``done`` of the total are done, with ``figures`` behind it."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=f"{self.unit} {figures}".strip())
        elif not self.quiet and time.monotonic() - self._said >= EVERY and done not in (self._told, self.total):
            self._said, self._told = time.monotonic(), done
            self.say(self.line(done, figures))

    def line(self, done: int, figures: str = "") -> str:
        """Returns a line such as ``score: 120 of 500 lines, about 40 s left``."""
        of = f"{done:,}" if self.total is None else f"{done:,} of {self.total:,}"
        left = time_left(time.monotonic() - self._began, done, self.total)
        return ", ".join(filter(None, (f"{self.what}: {of} {self.unit}", figures, left)))


def time_left(seconds: float, done: int, total: int | None) -> str:
    """Returns the time left after ``done`` of ``total`` took ``seconds``, in words; empty where it is not known."""
    if total is None or not 0 < done < total:
        return ""
    left = seconds / done * (total - done)
    return f"about {left:.0f} s left" if left < 100 else f"about {left / 60:.0f} min left"


def on_terminal() -> bool:
    """Returns whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def new_bar(transient: bool = False):
    """Returns a rich progress bar on standard error, whose tasks have the field ``figures``."""
    from rich.console import Console  # here: drawn on a terminal only
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),  # a narrow terminal has all of them
        TimeRemainingColumn(),
    )
    # what goes to standard output stays there: it may be a file
    console = Console(stderr=True)
    return Progress(*columns, console=console, refresh_per_second=2, transient=transient, redirect_stdout=False)
