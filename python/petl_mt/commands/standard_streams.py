"""Standard input, output and error where they are closed, or where nobody reads them."""

from __future__ import annotations

import os
import sys


def hold_closed_descriptors() -> None:
    """Opens the null device for each of descriptors 0 to 2 that is closed.

    A file that is opened later would get such a number, and with it all that libraries and handlers of signals write to
    standard output or error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def drop_unread() -> None:
    """Drops what standard output still holds where it cannot be written, which Python would report when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except AttributeError:  # closed from the start
        pass
