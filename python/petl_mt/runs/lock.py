"""One process at a time on a run's folder.

The lock is the system's own (``flock``): it ends with the process that holds it, however that ends, so that no stale
one is left. The file beside it only tells who holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petl_kernels.errors import InputError

from ..progress import say

NAME = ".lock"


@contextmanager
def locked(folder: Path, what: str = "run") -> Iterator[None]:
    """While the block runs no other process (and no other block of this one) gets past here for ``folder``.

    what: the folder is one's, in words. Raises InputError that names the process and the machine that hold the lock.
    Where the file system has no locks, a line on stderr says so.
    """
    path = folder / NAME
    handle = _acquire(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked: who waits for this file finds another, see _acquire
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
    """Whether ``handle`` is the file of that name, and not one that its holder has removed meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
