"""SIGINT and SIGTERM during training: the first one lets the update end, the second one stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..own_process import ONE_SIGNAL


@contextmanager
def stop_requests(tell: Callable[[bool], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether a signal has come; the second signal raises KeyboardInterrupt.

    tell(again) is called by each signal's handler. Signals within ``ONE_SIGNAL`` seconds of each other are one: a
    terminal or a scheduler that stops a whole group of processes, and a process that passes its own on, send several.
    """
    caught: list[float] = []  # when
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame) -> None:
        now = time.monotonic()
        if caught and now - caught[-1] < ONE_SIGNAL:
            return
        tell(bool(caught))
        if caught:
            raise KeyboardInterrupt
        caught.append(now)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
