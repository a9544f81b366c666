"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petl_kernels.layers import recompute
from petl_kernels.ops.quantized import parts_of


@dataclass
class Saved:
    """What a forward pass saved: one entry per distinct storage, in bytes."""

    storages: dict[int, int] = field(default_factory=dict)
    # Holding the tensors keeps a storage's key from being handed out twice while we count.
    _alive: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Count the bytes that the operations of this block save for backward.

    Unique storages, whole storages: a saved view keeps all of what it looks into. ``exclude`` names tensors
    that live anyway (parameters, buffers, the inputs of the step). Counting holds the saved tensors until the
    block's ``Saved`` goes, so use it for one step, not for a run. What lean layers keep is counted where they keep it.
    """
    # Storages by identity: one of a streamed layer that is away has no address.
    living = {part.untyped_storage()._cdata for tensor in exclude for part in parts_of(tensor)}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in living and storage.nbytes() and key not in saved.storages:
            saved.storages[key] = storage.nbytes()
            saved._alive.append(tensor.detach())
        return tensor.detach()  # a node that keeps its own output, with its history, would never go

    recompute.observers.append(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        recompute.observers.remove(pack)
