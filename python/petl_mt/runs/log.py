"""The log of a run: the terminal, metrics.jsonl, and TensorBoard where the configuration has it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write

from ..terminal import Watch, new_bar, on_terminal, say


class RunLog:
    """Writes a bar (or lines, where standard error is no terminal), metrics.jsonl, and TensorBoard's files."""

    def __init__(
        self, folder: Path, steps: int, start: int = 0, tensorboard: bool = False, quiet: bool = False
    ) -> None:
        self.quiet, self.steps = quiet, steps
        self._start, self._began, self._said = start, time.monotonic(), 0.0
        path = folder / "metrics.jsonl"
        _drop_after(path, start)
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._board = _board(folder / "tensorboard", start) if tensorboard else None
        self._bar = self._task = None
        if not quiet and on_terminal():
            self._bar = new_bar()
            self._task = self._bar.add_task("", total=steps, completed=start, figures="")
            self._bar.start()

    def metrics(self, step: int, **values: Any) -> None:
        """Writes one line of metrics.jsonl, with the step in it."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:  # a full disk; the error then names the file
            raise OSError(error.errno, error.strerror, self._file.name) from None
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float, tokens_per_second: float, memory: str) -> None:
        """Shows figures in the bar, or in a line every ten seconds; memory: the text of ``MemoryMeter``."""
        if self.quiet:
            return
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} target tokens/s  {memory}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._said < 10 and step < self.steps:
            return
        self._said = now
        left = (now - self._began) / max(1, step - self._start) * (self.steps - step)
        self.say(f"step {step}/{self.steps}  {figures}  {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        """Prints a line to standard error, above the bar where there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def searching(self, what: str, lines: int) -> Watch:
        """Returns the progress of a search over ``lines`` lines, which replaces the bar of steps."""
        self._stop_bar()
        return Watch(what, lines, "lines", self.quiet)

    def watching(self, what: str, total: int, unit: str) -> Watch:
        """Returns the progress of work between two steps, shown as lines above the bar of steps."""
        return Watch(what, total, unit, self.quiet, self.say)

    def close(self) -> None:
        """Removes the bar and closes the files."""
        self._stop_bar()
        if self._board is not None:
            self._board.close()
        with contextlib.suppress(OSError):  # an error of writing has been reported before
            self._file.close()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _drop_after(path: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, which a resumed run makes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # damaged, or being written when the run was killed
            continue
    with atomic_write(path) as file:
        file.write("".join(line + "\n" for line in kept))


def _board(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter  # here: optional, and slow to load
    except ImportError:
        raise InputError("tensorboard: not installed; pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter(str(folder), purge_step=start + 1)
