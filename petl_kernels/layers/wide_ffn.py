"""Frozen feed-forward weights with room for a parallel adapter, so that both are one network (``ops.parallel_ffn``).

The weights of the two linears move, once, to the front of buffers that have the adapter's rows and columns behind them;
the parameters become views of those. Bytes: the old weights go, and the room is there beside them, 2 · d · p elements
of the weights' dtype for p = ``room(m)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import activation_of
from petl_kernels.methods.adapter import ParallelAdapter
from petl_kernels.methods.structure import Layer
from petl_kernels.ops.parallel_ffn import room, with_room
from petl_kernels.ops.quantised import QuantisedTensor


class WideFFN:
    """The weights of ``first`` and ``out``, (f, d) and (d, f), inside w1 (f + p, d) and w2 (d, f + p).

    They stay the parameters of their modules. A copy of the model has weights of its own, and no such object.
    """

    def __init__(self, first: nn.Linear, out: nn.Linear, m: int):
        self.first, self.out, self.m = first, out, m
        w1, w2 = with_room(first.weight.detach(), out.weight.detach(), m)
        self.w1: Tensor | None = w1
        self.w2: Tensor | None = w2
        first.weight.data = w1[: first.weight.shape[0]]
        out.weight.data = w2[:, : out.weight.shape[1]]

    def serves(self, adapter: ParallelAdapter) -> bool:
        """Whether the modules' weights are still in here, with room for ``adapter``; frees the memory where not."""
        if self.w1 is None:
            return False
        inside = _is_inside(self.first.weight, self.w1) and _is_inside(self.out.weight, self.w2)
        if not inside or adapter.down.out_features != self.m:
            self.w1 = self.w2 = None
        return self.w1 is not None

    def moved(self) -> WideFFN:
        """The same for weights that have gone elsewhere, to another device or dtype."""
        return WideFFN(self.first, self.out, self.m)

    def undo(self) -> None:
        """Give the modules weights of their own again."""
        for module, wide in ((self.first, self.w1), (self.out, self.w2)):
            if wide is not None and _is_inside(module.weight, wide):
                module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)

    def __reduce__(self):
        return type(None), ()


def bottleneck_beside(model: nn.Module, layer: Layer) -> int:
    """The bottleneck of the active parallel adapter of ``layer`` that can be a part of its network; 0 for none."""
    linears = [model.get_submodule(path) for path in layer.ffn.linears]
    piece = linears[-1].petl.current() if hasattr(linears[-1], "petl") else None
    if not isinstance(piece, ParallelAdapter) or len(linears) != 2:
        return 0
    weights = [linear.weight for linear in linears]
    if any(isinstance(weight, QuantisedTensor) or weight.requires_grad for weight in weights):
        return 0
    same = weights[0].dtype == weights[1].dtype and piece.activation == activation_of(model.get_submodule(layer.path))
    return piece.down.out_features if same else 0


def room_bytes(model: nn.Module, layer: Layer) -> int:
    """What ``WideFFN`` will take for ``layer`` beside its weights."""
    first = model.get_submodule(layer.ffn.inputs[0])
    return 2 * room(bottleneck_beside(model, layer)) * first.in_features * first.weight.dtype.itemsize


def _is_inside(weight: Tensor, wide: Tensor) -> bool:
    """At the front of ``wide``, in its memory."""
    if isinstance(weight, QuantisedTensor) or weight.device != wide.device or weight.dtype != wide.dtype:
        return False
    same = weight.untyped_storage()._cdata == wide.untyped_storage()._cdata
    return same and weight.storage_offset() == 0 and weight.stride() == wide.stride()
