"""A layer's input that waits for its backward pass in host memory.

On CUDA the copies run on a stream of their own, beside the matrix work, and nothing waits on the host:

    forward     the copy to pinned memory starts with the layer; the next layer waits for its end, and then the input
                is freed. So one input at most is on the device beside the running layer's.
    backward    when a layer's input is read, the copy of the input before it starts back to the device.

Memory on the device belongs to the compute stream at both ends: a copy waits for the work of that stream so far, and
that stream waits for the copy before the memory is read or freed. Host buffers are read and written by the one stream
of copies, in its order, so a buffer can be used again at once.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels.errors import InputError


def host_copy(x: Tensor) -> HostCopy | TravellingCopy:
    """Returns what holds ``x``, the input of the layer that runs next. Call its ``leave`` when the layer has run."""
    return _travels(x.device).out(x) if x.is_cuda else HostCopy(x)


class HostCopy:
    """A copy in the same memory, where there is no other device."""

    _host: Tensor  # from ``leave`` on

    def __init__(self, x: Tensor):
        self._x: Tensor | None = x

    def get(self) -> Tensor:
        """Returns x itself until ``leave``, then its copy."""
        if self._x is not None:
            return self._x
        return self._host.detach().requires_grad_(self._requires_grad)

    def leave(self) -> None:
        """Makes the copy and drops x."""
        x, self._x = self._x, None
        assert x is not None, "a layer leaves once"
        self._host, self._requires_grad = x.detach().clone(), x.requires_grad


class TravellingCopy:
    """A copy to pinned memory and back. before: returns the copy of the layer before, while it lives."""

    _x: Tensor | None = None  # on the device: the tensor itself, or its copy back
    _running = True

    def __init__(self, x: Tensor, buffer: Tensor, travels: Travels, before: Callable[[], TravellingCopy | None]):
        self._travels, self._buffer, self._before = travels, buffer, before
        self._requires_grad, self._device = x.requires_grad, x.device
        self._host = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        self._moved = travels.copies.start(self._host, x.detach())
        self._x = x

    def get(self) -> Tensor:
        """Returns x itself until ``leave``, then its copy, and starts the copy of the input before it."""
        if self._running:
            assert self._x is not None, "x stays while the layer runs"
            return self._x
        x, self._x = self._fetch(), None
        self._travels.copies.wait(self._moved)
        before = self._before()
        if before is not None:
            before._fetch()
        return x.detach().requires_grad_(self._requires_grad)

    def leave(self) -> None:
        """Ends the layer's forward pass. x stays until the next layer starts: backward reads the last input first."""
        self._running = False

    def give_back(self) -> None:
        """Frees the memory on the device, after the copy."""
        if self._x is not None:
            self._travels.copies.wait(self._moved)
            self._x = None

    def _fetch(self) -> Tensor:
        """Starts the copy back, where none has started, and returns it."""
        x = self._x
        if x is None:
            self._x = x = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._moved = self._travels.copies.start(x, self._host)
        return x

    def __del__(self):
        self.give_back()
        self._travels.put(self._buffer)


class Travels:
    """The copies of one device and thread, and the pinned buffers that they share from step to step."""

    def __init__(self, copies: InputCopies):
        self.copies = copies
        self._back: deque[Tensor] = deque()  # filled by the threads that drop copies
        self._free: list[Tensor] = []
        self._last: Callable[[], TravellingCopy | None] = lambda: None

    def out(self, x: Tensor) -> TravellingCopy:
        """Starts a copy of ``x``, and frees the input before it on the device."""
        held = TravellingCopy(x, self._take(x.nbytes), self, self._last)
        before = self._last()
        if before is not None:
            before.give_back()
        self._last = weakref.ref(held)
        return held

    def put(self, buffer: Tensor) -> None:
        """Takes a pinned buffer back for later copies."""
        self._back.append(buffer)

    def _take(self, size: int) -> Tensor:
        """Returns the smallest free buffer of ``size`` bytes or more, or a new one in the place of a smaller."""
        while self._back:
            self._free.append(self._back.popleft())
        self._free.sort(key=lambda buffer: buffer.nbytes)
        for k, buffer in enumerate(self._free):
            if buffer.nbytes >= size:
                return self._free.pop(k)
        if self._free:
            self._free.pop()
        return self.copies.pinned(1 << max(0, size - 1).bit_length())  # as PyTorch rounds it anyway


class InputCopies:
    """Copies of layers' inputs to pinned memory and back, on a stream of their own."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def pinned(self, size: int) -> Tensor:
        """Returns pinned memory uint8 (size,). Raises InputError where the host has not enough."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise InputError(
                f"tier 5: {size:,} bytes of pinned host memory cannot be had ({str(error).splitlines()[0]}); "
                "expected a host with that much free, or a lower tier"
            ) from None

    def start(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        """Starts a copy after the work of the current stream so far, and returns the event of its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()  # pyright: ignore[reportReturnType]  one of ``torch.cuda.Event``

    def wait(self, event: torch.cuda.Event) -> None:
        """Lets later work of the current stream run after ``event``."""
        torch.cuda.current_stream(self._device).wait_event(event)


class _OfThread(threading.local):
    def __init__(self):
        self.travels: dict[torch.device, Travels] = {}


_of_thread = _OfThread()


def _travels(device: torch.device) -> Travels:
    known = _of_thread.travels
    if device not in known:
        known[device] = Travels(InputCopies(device))
    return known[device]
