"""Lines of a file or a pipe, in windows that are translated together.

A window ends when it is full, or when the input pauses: a lone line of ``tail -f`` does not wait for others. The first
window is small, so that the first translations come soon, and each full window doubles the next. A file never pauses;
its windows, and with them its translations, are the same each time.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from petl_kernels.errors import InputError

from ..data import decode_lines

FIRST = 16  # lines of the first window
PAUSE = 0.1  # seconds without input that close a window
CHUNK = 1 << 16


class LineWindows:
    """The lines of the UTF-8 text ``path``, or of standard input where that is None.

    total: the lines of a regular file, None for anything else. size: its bytes, 0 for anything else.
    """

    def __init__(self, path: str | None) -> None:
        self.name = path or "standard input"
        self._file = _open(path)
        self._fd = _descriptor(self._file)
        self.total, self.size = _measure(self._fd)
        self._unended = False  # no line feed after the last line

    def windows(self, most: int) -> Iterator[list[str]]:
        """Yields lists of at most ``most`` lines. Raises InputError for a line that is not UTF-8."""
        first, wanted, waiting = 1, min(FIRST, most), []
        for piece in self._pieces():
            waiting += piece
            while len(waiting) >= wanted or (waiting and not piece):  # full, or the input pauses
                window, waiting = waiting[:wanted], waiting[wanted:]
                if len(window) == wanted:
                    wanted = min(2 * wanted, most)
                yield self._decoded(window, first)
                first += len(window)
        if waiting:
            yield self._decoded(waiting, first, b"" if self._unended and first == 1 else b"\n")

    def _pieces(self) -> Iterator[list[bytes]]:
        """Yields the lines that have arrived, without their ends; an empty list for a pause."""
        rest = b""
        while chunk := self._read():
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if lines:
                yield lines
            if self._pauses():
                yield []
        if rest:
            self._unended = True
            yield [rest]

    def _read(self) -> bytes:
        return self._file.read(CHUNK) if self._fd is None else os.read(self._fd, CHUNK)

    def _pauses(self) -> bool:
        return self._fd is not None and not select.select([self._fd], [], [], PAUSE)[0]

    def _decoded(self, window: list[bytes], first: int, end: bytes = b"\n") -> list[str]:
        return decode_lines(b"\n".join(window) + end, self.name, first)


def check_other(source: str | None, target: str | None, option: str = "--out") -> None:
    """Raises InputError where ``target``, or the part of it that comes first, is the file that is read.

    source: the path that is read, None for standard input.
    """
    if target is None:
        return
    for path in (target, f"{os.path.realpath(target) if os.path.islink(target) else target}.part"):
        try:
            read = os.stat(source) if source is not None else os.fstat(sys.stdin.fileno())
            same = stat.S_ISREG(read.st_mode) and os.path.samestat(read, os.stat(path))
        except (OSError, AttributeError, ValueError):  # not there, or no file
            continue
        if same:
            raise InputError(f"{option} {target}: {path} is what is read; expected another file")


def _open(path: str | None) -> BinaryIO:
    if path is not None:
        return open(path, "rb", buffering=0)
    if sys.stdin is None:
        raise InputError("standard input: is closed; expected text, or --in FILE")
    return sys.stdin.buffer


def _descriptor(file: BinaryIO) -> int | None:
    try:
        return file.fileno()
    except io.UnsupportedOperation:  # in memory
        return None


def _measure(fd: int | None) -> tuple[int | None, int]:
    """Returns (lines, bytes) from the position of a regular file to its end."""
    if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
        return None, 0
    place = start = os.lseek(fd, 0, os.SEEK_CUR)
    lines, last = 0, b"\n"
    while chunk := os.pread(fd, 1 << 20, place):
        place += len(chunk)
        lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    return lines + (last != b"\n"), place - start
