"""Bytes that autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petl_kernels.ops.quantized import parts_of

# Called with each tensor that lean layers save: hooks of ``torch.autograd.graph`` outside of theirs get none of them.
observers: list[Callable[[Tensor], object]] = []


@dataclass
class Saved:
    """The storages that a forward pass saved, with their bytes."""

    storages: dict[int, int] = field(default_factory=dict)
    # Tensors that are held, so that no other storage gets the key of one that was counted.
    _alive: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Counts the bytes that the operations of this block save for backward, those of lean layers included.

    Each storage counts once and as a whole, since a saved view keeps all of it. exclude: tensors that live anyway
    (parameters, buffers, the inputs of the step). The saved tensors are held until the ``Saved`` goes, so this is for
    one step, not for a run.
    """
    # Storages by identity: one of a streamed layer that is away has no address.
    living = {plain.untyped_storage()._cdata for tensor in exclude for plain in parts_of(tensor)}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in living and storage.nbytes() and key not in saved.storages:
            saved.storages[key] = storage.nbytes()
            saved._alive.append(tensor.detach())
        return tensor.detach()  # a node that keeps its own output, with its history, would never go

    observers.append(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        observers.remove(pack)
