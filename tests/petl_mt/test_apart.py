"""Work in a process of its own: its memory, its errors, its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from petl_mt.memory_meter import process_bytes
from petl_mt.own_process import in_own_process

from petl_kernels.errors import InputError


def take(megabytes: int) -> tuple[int, int, int]:
    """Returns (the process, its highest resident set, its threads) after it has written so many megabytes."""
    held = np.ones(megabytes << 20, dtype=np.uint8)
    return os.getpid(), process_bytes() + 0 * int(held[-1]), torch.get_num_threads()


class Stopped(InputError):
    """An error that only this module defines."""


def stop() -> None:
    raise Stopped("loss is nan")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_has_its_own_memory():
    """The memory of one process does not count for the next."""
    (one, much, threads), (other, little, _) = in_own_process(take, 300), in_own_process(take, 1)
    assert len({one, other, os.getpid()}) == 3 and threads == torch.get_num_threads()
    assert much - little > 250 << 20


def test_errors_come_back_as_they_are():
    with pytest.raises(Stopped, match="loss is nan"):
        in_own_process(stop)
    with pytest.raises(InputError, match="the process of die was killed"):
        in_own_process(die)


def wait_for_signal(path: str) -> None:
    def handle(number, frame):
        Path(path).write_text(signal.Signals(number).name)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    Path(path).write_text("ready")
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.repeat)])
def test_signals_end_the_process_too(tmp_path, number):
    """Several signals that come together, as from `timeout` or Ctrl-C, are passed on once."""
    path = tmp_path / "said"

    def send():
        while not (path.exists() and path.read_text() == "ready"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_own_process(wait_for_signal, str(path))
    thread.join()
    assert path.read_text() == "SIGTERM" and signal.getsignal(number) is before
