"""The most tensor memory that a piece of work holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl_kernels.ops.quantized import parts_of
from petl_kernels.planning.scratch import scratch_bytes


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations create, and takes each off when it is freed.

    live, peak: bytes now, and the most so far. A kernel's own temporaries are no operations; those of this package's
    ops are added as ``scratch_bytes`` gives them.
    """

    def __init__(self, living: Iterable[Tensor], device: str = "cpu"):
        """living: tensors that exist already. device: the kind of device whose kernels are counted."""
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  # torch has no types for it
        self.device = device
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # of the storages that live
        self._enter_all(living)

    def _enter_all(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            for plain in parts_of(tensor):
                self._enter(plain)

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        if key in self._sizes or not size:
            return
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._enter_all(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.peak = max(self.peak, self.live + scratch_bytes(function, args, self.device, kwargs))
        return result
