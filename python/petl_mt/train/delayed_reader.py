"""Numbers of an update that the host reads while the device computes the next one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DelayedReader:
    """Calls ``tell(*what, numbers)`` for each ``put``: at once on a CPU, one ``put`` later on a CUDA device.

    Reading a number of an update that has just been queued would make the host wait for all of it, and leave the device
    without work until the host has queued the next one.
    """

    def __init__(self, device: torch.device, tell: Callable[..., None]):
        self._late = device.type == "cuda"
        self._tell = tell
        self._waiting: tuple[tuple, Tensor, torch.cuda.Event | None] | None = None

    def put(self, values: Tensor, *what) -> None:
        """Takes ``values``, 1-D and on the device; ``what`` is handed on as it is."""
        before, self._waiting = self._waiting, (what, *self._copied(values))
        if before is not None:
            self._read(before)
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Reads the numbers that have not been read yet."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._read(waiting)

    def _copied(self, values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if not values.is_cuda:
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _read(self, waiting: tuple) -> None:
        what, values, event = waiting
        if event is not None:
            event.synchronize()
        self._tell(*what, values.tolist())
