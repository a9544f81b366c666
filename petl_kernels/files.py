"""Files that appear whole or not at all.

Everything is written under a temporary name beside its target, flushed to the disk, and then renamed. A run that is
killed, or a disk that is full, leaves the old content as it was and no half-written file under the target's name.
Files get the permissions of the umask: safetensors makes its own readable for their owner alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, whose file becomes `path` when the block ends without an error.

    Raises OSError that names `path` when the disk is full or the folder cannot be written. On any error the
    temporary file is removed and an older `path` stays untouched.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with _errors_name(path, temporary):
            mode = _mode_of_new_file(temporary)
            yield temporary
            temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Yields an open file ("w": UTF-8 text with \\n line ends, "wb": bytes), which becomes `path` at the block's end.

    Raises as `atomic_path` does.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with atomic_path(path) as temporary, open(temporary, mode, **text) as file:
        yield file
        file.flush()


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes the folder `path` when the block ends without an error.

    An older folder `path` is replaced as a whole, in one step where the system can exchange two names (Linux).
    Raises as `atomic_path` does; then the temporary folder is removed and an older `path` stays untouched.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with _errors_name(path, temporary):
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            temporary.mkdir()
            mode = _mode_of_new_file(temporary / "mode")
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    Path(folder, name).chmod(mode)
                    _flush(Path(folder, name))
                _flush(Path(folder))
            _rename_folder(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def _mode_of_new_file(path: Path) -> int:
    """Returns the mode that the umask gives a file there; to read the umask itself is to set it, for all threads."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename_folder(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    if _exchange(temporary, path):  # the older folder now has the temporary name, and is removed by the caller
        return
    old = _beside(path)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); returns False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """Makes the disk's errors name the file that the user has given, where they name the temporary one or none."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or os.fspath(error.filename).startswith(str(temporary))
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:  # safetensors reports the disk's errors as its own, with the number in the text
        number = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
