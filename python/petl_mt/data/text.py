"""Parallel text: files that are read, and checked line by line."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from pathlib import Path

from petl_kernels.errors import InputError

from ..config import Pair

Text = tuple[Pair, list[str], list[str]]  # a pair, its source lines, its target lines

# First bytes of files that are no UTF-8 text, and their names in messages. Files in gzip are read.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Characters that show nothing although Unicode counts them as letters, marks or symbols: fillers, joiners, selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_UNSEEN_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # control, format, spaces


def has_text(line: str) -> bool:
    """Returns whether ``line`` shows anything, which spaces, controls, zero-width and joining characters do not."""
    return any(unicodedata.category(c) not in _UNSEEN_CATEGORIES and not _UNSEEN.match(c) for c in line)


def read_lines(path: str | Path) -> list[str]:
    """Returns the lines of a UTF-8 text file, plain or gzip (by its first bytes), without their ends.

    A line ends at "\\n" or "\\r\\n" only: other separators of Unicode stand inside sentences. Raises InputError that
    names the file and the line, for a file that is unreadable, empty, not UTF-8 or of another kind.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a text file") from None
    lines = decode_lines(data, str(path))
    if not any(map(has_text, lines)):
        raise InputError(f"{path}: empty; expected one sentence a line")
    return lines


def decode_lines(data: bytes, name: str, first: int = 1) -> list[str]:
    """Returns the lines of UTF-8 text.

    name, first: the name of the text and the number of its first line, for messages. Raises InputError for text that is
    not UTF-8, or of another kind.
    """
    problem = "no text"
    try:
        text = data.decode("utf-8")
        at = data.find(b"\x00")
    except UnicodeDecodeError as error:
        at, problem = error.start, "not UTF-8"
    if at >= 0:
        kinds = (f"is {kind}; expected UTF-8 text: " for start, kind in _MAGIC.items() if data.startswith(start))
        line = data.count(b"\n", 0, at) + first
        raise InputError(f"{name}: {next(kinds, '')}line {line} is {problem} (byte 0x{data[at]:02x})")
    if "\r" in text.strip() and "\n" not in text:
        raise InputError(f"{name}: its lines end with carriage returns alone; expected line feeds")
    lines = (text.removeprefix("\ufeff") if first == 1 else text).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def read_pair(pair: Pair) -> tuple[list[str], list[str]]:
    """Returns both sides of a pair. Raises InputError unless they have the same number of lines."""
    source, target = read_lines(pair.source), read_lines(pair.target)
    if len(source) != len(target):
        raise InputError(
            f"{pair.source} has {len(source)} lines and {pair.target} has {len(target)}: "
            "expected files aligned line by line"
        )
    return source, target
