"""Weights in pinned host memory that are copied into a few slots of device memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.extension import extension
from petl_kernels.units import format_size
from petl_kernels.weights.mapped import Weights

_ALIGNMENT = 256  # of tensors in a slot, as CUDA's own allocations have


class SlotCopies:
    """Pinned memory, and the copies from it into slots of ``device``."""

    def __init__(self, device: torch.device):
        self._device = resolve(device)
        self._ring: Any = None  # the extension's, once it is open

    def pinned(self, size: int) -> Tensor:
        return extension().pinned(size)

    def open(self, slots: list[int]) -> None:
        self._ring = extension().SlotRing(slots, self._device.index)

    def fill(self, slot: int, pieces: list[tuple[int, int, int]]) -> None:
        self._ring.fill(slot, pieces)

    def acquire(self, slot: int) -> None:
        self._ring.acquire(slot, self._stream())

    def release(self, slot: int) -> None:
        self._ring.release(slot, self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream


class Slots:
    """The weights of some layers in pinned host memory, with ``count`` slots on the device."""

    def __init__(self, weights: list[Weights], count: int, device: torch.device, copies: SlotCopies):
        self._weights, self._copies, self._device = weights, copies, device
        self._offsets = [_offsets(own.values()) for own in weights]
        self._layer_in: list[int | None] = [None] * count
        self._host: list[Weights] = []
        self._memory: list[Tensor] = []

    def take(self) -> None:
        """Moves the weights into host memory and allocates the slots.

        Raises InputError, with the weights where they were, for too little pinned memory.
        """
        self._move_out()
        size = max(offsets[-1] for offsets in self._offsets)
        self._memory = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in self._layer_in]
        self._copies.open([memory.data_ptr() for memory in self._memory])
        for slot in range(len(self._memory)):
            self._copies.release(slot)  # what had this memory before may still be at work

    def use(self, i: int, ahead: list[int]) -> None:
        """Makes the current stream wait for layer ``i``, and starts the copies of ``ahead``."""
        needed = (i, *ahead)
        for layer in needed:
            if layer not in self._layer_in:
                self._bring(layer, next(s for s, held in enumerate(self._layer_in) if held not in needed))
        self._copies.acquire(self._layer_in.index(i))

    def resident_bytes(self) -> int:
        """Returns the bytes of the slots."""
        return sum(memory.nbytes for memory in self._memory)

    def saved(self, i: int) -> Weights:
        """Returns the values of layer ``i``, in host memory."""
        return self._host[i]

    def values(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yields (tensor, a copy of its values on the device)."""
        for own, host in zip(self._weights, self._host, strict=True):
            for name, tensor in own.items():
                yield tensor, host[name].to(self._device, copy=True)

    def _move_out(self) -> None:
        """Moves layer after layer, so that host memory never holds the weights twice."""
        before = next(iter(self._weights[0].values())).device
        try:
            for i, own in enumerate(self._weights):
                self._host.append({name: self._pinned_copy(tensor) for name, tensor in own.items()})
                for tensor in own.values():
                    tensor.data = torch.empty_like(tensor, device=self._device)
                self._take_away(i)
        except RuntimeError as error:
            for own, host in zip(self._weights, self._host, strict=False):
                for name, tensor in own.items():
                    tensor.data = host[name].to(before, copy=True)
            size = sum(tensor.nbytes for own in self._weights for tensor in own.values())
            raise InputError(
                f"stream_layers: {format_size(size)} of pinned host memory cannot be had ({error}); "
                "expected a host with that much free, or fewer layers"
            ) from None

    def _pinned_copy(self, tensor: Tensor) -> Tensor:
        return self._copies.pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def _bring(self, layer: int, slot: int) -> None:
        before = self._layer_in[slot]
        if before is not None:
            self._take_away(before)
            self._copies.release(slot)
        base, offsets = self._memory[slot].data_ptr(), self._offsets[layer]
        pieces = []
        for (name, tensor), offset in zip(self._weights[layer].items(), offsets, strict=False):
            extension().place(tensor, base + offset)
            host = self._host[layer][name]
            pieces.append((host.data_ptr(), offset, host.nbytes))
        self._copies.fill(slot, pieces)
        self._layer_in[slot] = layer

    def _take_away(self, layer: int) -> None:
        for name, tensor in self._weights[layer].items():
            extension().take_away(tensor, f"{name}: streamed, and read outside of its layer; unstream the model first")


def _offsets(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the bytes at which each tensor starts in a slot, and the one at which the last ends."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
