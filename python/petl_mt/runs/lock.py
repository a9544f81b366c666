"""One process at a time on a run's folder.

The lock is the system's own (``flock``): it ends with the process that holds it, however that ends, so that no stale
one is left. The file only tells which process holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petl_kernels.errors import InputError

from ..terminal import say

NAME = ".lock"


@contextmanager
def locked(folder: Path, what: str = "run") -> Iterator[None]:
    """Holds the lock of ``folder`` while the block runs, against other processes and other blocks of this one.

    what: the kind of folder, for messages. Raises InputError that names the process and the machine that hold the lock.
    Where the file system has no locks, a line on standard error warns.
    """
    path = folder / NAME
    handle = _acquire(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked: a process that opened this file finds another one, see _acquire
        os.close(handle)


def _acquire(path: Path, what: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise InputError(
                f"{what} {path.parent}: {holder} works in it; expected another folder, or its end"
            ) from None
        except OSError as error:
            say(f"{what} {path.parent}: not locked ({error.strerror}); start no second process on it")
        if _is_still(path, handle):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    """Returns whether ``handle`` is the file of that name, and not one that its holder has removed meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
