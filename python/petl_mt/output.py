"""What is written for the user: refused before the work where it cannot be, and lines that go out as they come."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from petl_kernels.errors import InputError
from petl_kernels.memory.size import format_size


def check_file(option: str, path: str | Path, size: int = 0) -> None:
    """Raise InputError unless the file ``path`` can be written: its folder is there, open to us, with room for
    ``size`` bytes. ``option``: what the user calls it."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; expected a file to write")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    check_folder(option, path, path.parent, size)


def check_folder(option: str, path: str | Path, folder: str | Path, size: int = 0) -> None:
    """Raise InputError unless something named ``path`` can be made in ``folder``."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise InputError(f"{option} {path}: {folder}: {what}; expected one that is there")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{option} {path}: the disk has {format_size(free)} left; expected {format_size(size)} at least"
        )


def check_new_folder(option: str, path: str | Path) -> None:
    """Raise InputError unless the folder ``path`` can be made or written into, with all that is missing above it."""
    path = Path(path)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    check_folder(option, path, nearest)


class LineSink:
    """Where translations go, each at once: standard output, or ``path``, which has its name when all are there.

    Until then they are in ``path`` with ``.part`` behind; what is there when the work is cut short stays, and a line
    says so. size: bytes that are expected. Raises InputError before the work where nothing can be written.
    """

    def __init__(self, option: str, path: str | None, size: int = 0) -> None:
        self.path, self.lines = path, 0
        self._part = None
        if path is None:
            if sys.stdout is None:
                raise InputError(f"standard output: is closed; expected it open, or {option} FILE")
            self._file = sys.stdout.buffer
            return
        check_file(option, path, size)
        special = os.path.exists(path) and not os.path.isfile(path)
        self._part = None if special else f"{path}.part"
        self._file = open(self._part or path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> LineSink:
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
                self._settle(kind is None)

    def _settle(self, whole: bool) -> None:
        if whole:
            os.replace(self._part, self.path)
        elif not self.lines:
            os.unlink(self._part)
        else:
            print(f"{self.lines:,} lines are in {self._part}", file=sys.stderr)


def drop_unread() -> None:
    """Let what standard output still holds go nowhere, where it cannot be written: Python would say so at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except AttributeError:  # closed from the start
        pass
