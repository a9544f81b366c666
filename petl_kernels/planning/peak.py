"""The most tensor memory that a piece of work holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl_kernels.ops.quantized import parts_of
from petl_kernels.planning.scratch import scratch_bytes


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations create, and takes each off when it is freed.

    What a kernel allocates and frees inside itself is not seen, but known for the ops of this package (``scratch``).
    """

    def __init__(self, living: Iterable[Tensor], device: str = "cpu"):
        """living: what is there already. device: whose kernels are counted."""
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in living:
            for part in parts_of(tensor):
                self._enter(part)

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for part in parts_of(leaf):
                    self._enter(part)
        self.peak = max(self.peak, self.live + scratch_bytes(function, args, self.device))
        return result
