"""A function that runs in a process of its own, whose memory is free again when it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from petl_kernels.errors import InputError

ONE_SIGNAL = 1.0  # seconds; signals to stop that are closer together are one


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``, computed in a new process; what it raises is raised here.

    ``function`` stands at the top of a module; arguments and result can be pickled. Where the system can fork, the
    process is a copy of one that has only imported that module, which takes seconds once. It computes with as many
    threads as this process. SIGINT and SIGTERM are passed on to it, and raise KeyboardInterrupt here when it has ended;
    where this process is killed, it gets SIGTERM. Raises InputError when the process is killed, by the system's lack of
    memory for example.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__, function.__module__])
    process: list[int] = []
    with _passing_signals_on(process) as caught:
        try:
            with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(torch.get_num_threads(),)) as pool:
                process.append(pool.submit(os.getpid).result())
                result = pool.submit(_work, function, arguments).result()
        except BrokenProcessPool:
            if caught:
                raise KeyboardInterrupt from None
            raise InputError(
                f"the process of {function.__name__.strip('_')} was killed; the host's memory may have run out"
            ) from None
    if caught:  # too late to stop the work
        raise KeyboardInterrupt
    return result


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(function: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return function(*arguments)
    finally:
        if not _parent().is_alive():  # the result has no reader, and no work will follow
            os._exit(1)


def _parent() -> BaseProcess:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a process that multiprocessing has started
    return parent


def _end_with_parent() -> None:
    _parent().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _passing_signals_on(process: list[int]) -> Iterator[list[float]]:
    """SIGINT and SIGTERM go to ``process`` (its id, once it is there) as SIGTERM, the third one as SIGKILL.

    Yields when they came. Where there is no process yet, they raise KeyboardInterrupt.
    """
    caught: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame) -> None:
        now = time.monotonic()
        if caught and now - caught[-1] < ONE_SIGNAL:
            return
        caught.append(now)
        if not process:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):
            os.kill(process[0], signal.SIGTERM if len(caught) < 3 else signal.SIGKILL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
