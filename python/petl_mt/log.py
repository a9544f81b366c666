"""Progress on the terminal, metrics.jsonl, and TensorBoard when asked."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from petl_kernels.errors import InputError

from .progress import Watch, new_bar, on_terminal, say


class RunLog:
    """Where a run reports to: a bar (or lines, when stderr is no terminal), metrics.jsonl, TensorBoard."""

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
        """One line of metrics.jsonl."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:  # a full disk: say which file
            raise OSError(error.errno, error.strerror, self._file.name) from None
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float, tokens_per_second: float, memory: str) -> None:
        """memory: what the run takes, as ``petl_mt.memory`` words it."""
        if self.quiet:
            return
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} target tokens/s  {memory}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._said < 10 and step < self.steps:
            return
        self._said = now
        left = (now - self._began) / max(1, step - self._start) * (self.steps - step)
        self.say(f"step {step}/{self.steps}  {figures}  {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        """A line for the reader, on stderr."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def searching(self, what: str, lines: int) -> Watch:
        """The progress of a search over ``lines``, which takes the place of the bar of steps."""
        self._stop_bar()
        return Watch(what, lines, "lines", self.quiet)

    def watching(self, what: str, total: int, unit: str) -> Watch:
        """The progress of work between two steps: lines, above the bar of steps where there is one."""
        return Watch(what, total, unit, self.quiet, self.say)

    def close(self) -> None:
        self._stop_bar()
        if self._board is not None:
            self._board.close()
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._file.close()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _drop_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their lines go."""
    from petl_kernels.files import atomic_write

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
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tensorboard: not installed; pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter(str(folder), purge_step=start + 1)
