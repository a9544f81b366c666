"""Translations that are written line by line."""

from __future__ import annotations

import os
import sys

from petl_kernels.errors import InputError

from ..checks import check_file
from ..terminal import say


class OutputLines:
    """Lines for standard output, or for the file ``path``, each written at once.

    A file is called ``path`` with ``.part`` behind it until all lines are there. Where the work is cut short, that part
    stays, and a line on standard error names it. A link stands for the file that it leads to.

    option: the flag that ``path`` comes from, for messages. size: the bytes that are expected. Raises InputError where
    nothing can be written, or where the part of another run is.
    """

    def __init__(self, option: str, path: str | None, size: int = 0) -> None:
        self.path, self.lines = path, 0
        self._part = None
        if path is None:
            if sys.stdout is None:
                raise InputError(f"standard output: is closed; expected it open, or {option} FILE")
            self._file = sys.stdout.buffer
            return
        if os.path.islink(path):
            self.path = path = os.path.realpath(path)
        check_file(option, path, size=size)
        special = os.path.exists(path) and not os.path.isfile(path)
        self._part = None if special else f"{path}.part"
        if self._part and os.path.exists(self._part) and os.path.getsize(self._part):
            raise InputError(
                f"{option} {path}: {self._part} holds lines of a run that was stopped, or that goes on; expected it "
                "moved away or removed"
            )
        self._file = open(self._part or path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> OutputLines:
        return self

    def write(self, lines: list[str]) -> None:
        try:
            self._file.write("".join(line + "\n" for line in lines).encode())
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._part or self.path) from None
        self.lines += len(lines)

    def __exit__(self, kind, error, trace) -> None:
        if self.path is None:
            return
        try:
            self._file.close()
        except OSError:
            if kind is None:
                raise
        finally:
            if self._part is not None:
                self._settle(self._part, self.path, kind is None)

    def _settle(self, part: str, path: str, whole: bool) -> None:
        if whole:
            os.replace(part, path)
        elif not self.lines:
            os.unlink(part)
        else:
            say(f"{self.lines:,} lines are in {part}")
