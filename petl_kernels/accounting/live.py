"""Bytes that a forward pass leaves alive, whatever holds them: the strictest count of what is kept for backward."""

from __future__ import annotations

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl_kernels.ops.quantized import parts_of


class Born(TorchDispatchMode):
    """Records, without holding them, the storages that the operations of a block make.

    ``saved_bytes`` counts what passes through autograd's hooks. This counts every byte that is still there: also copies
    that a module holds, inputs that a closure holds, caches.
    """

    def __init__(self):
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:  # no view of something older
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        """Collects garbage and returns the bytes of the storages that live then."""
        gc.collect()
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _storages(values) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return [plain.untyped_storage() for tensor in tensors for plain in parts_of(tensor)]
