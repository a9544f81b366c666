"""Frozen feed-forward weights with room for a parallel adapter, so that both are one network (``ops.parallel_ffn``).

The weights of the two linears move, once, to the front of buffers that have the adapter's rows and columns behind them;
the parameters become views of those. Bytes: the old weights go, and the room is there beside them, (2d + 1) · p
elements of the weights' dtype for p = ``room(m)``.
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
    """Weight and bias of ``first``, (f, d) and (f,), and the weight of ``out``, (d, f), inside larger tensors:
    w1 (f + p, d), c1 (f + p,), w2 (d, f + p).

    They stay the parameters of their modules. A copy of the model has tensors of its own, and no such object.
    """

    def __init__(self, first: nn.Linear, out: nn.Linear, m: int):
        self.first, self.out, self.m = first, out, m
        self.w1, self.c1, self.w2 = with_room(first.weight.detach(), _detached(first.bias), out.weight.detach(), m)
        for parameter, wide in self._pairs():
            parameter.data = wide[tuple(map(slice, parameter.shape))]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, where it should be), empty once the memory is free."""
        pairs = [(self.first.weight, self.w1), (self.first.bias, self.c1), (self.out.weight, self.w2)]
        return [(parameter, wide) for parameter, wide in pairs if parameter is not None and wide is not None]

    def serves(self, adapter: ParallelAdapter) -> bool:
        """Whether the modules' weights are still in here, with room for ``adapter``; frees the memory where not."""
        if self.w1 is None:
            return False
        if adapter.down.out_features != self.m or not all(_is_inside(*pair) for pair in self._pairs()):
            self.w1 = self.c1 = self.w2 = None
        return self.w1 is not None

    def moved(self) -> WideFFN:
        """The same for weights that have gone elsewhere, to another device or dtype."""
        return WideFFN(self.first, self.out, self.m)

    def undo(self) -> None:
        """Give the modules tensors of their own again."""
        for parameter, wide in self._pairs():
            if _is_inside(parameter, wide):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def __reduce__(self):
        return type(None), ()


def bottleneck_beside(model: nn.Module, layer: Layer) -> int:
    """The bottleneck of the active parallel adapter of ``layer`` that can be a part of its network; 0 for none."""
    linears = [model.get_submodule(path) for path in layer.ffn.linears]
    piece = linears[-1].petl.current() if hasattr(linears[-1], "petl") else None
    if not isinstance(piece, ParallelAdapter) or len(linears) != 2:
        return 0
    frozen = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    if any(isinstance(tensor, QuantisedTensor) or tensor.requires_grad for tensor in frozen):
        return 0
    same = len({tensor.dtype for tensor in frozen}) == 1 and piece.activation == activation_of(
        model.get_submodule(layer.path)
    )
    return piece.down.out_features if same else 0


def room_bytes(model: nn.Module, layer: Layer) -> int:
    """What ``WideFFN`` will take for ``layer`` beside its weights."""
    first = model.get_submodule(layer.ffn.inputs[0])
    hidden = room(bottleneck_beside(model, layer))
    biases = hidden + (first.out_features if hidden and first.bias is None else 0)
    return (2 * hidden * first.in_features + biases) * first.weight.dtype.itemsize


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _is_inside(parameter: Tensor, wide: Tensor) -> bool:
    """At the front of ``wide``, in its memory."""
    if isinstance(parameter, QuantisedTensor) or (parameter.device, parameter.dtype) != (wide.device, wide.dtype):
        return False
    same = parameter.untyped_storage()._cdata == wide.untyped_storage()._cdata
    return same and parameter.storage_offset() == 0 and parameter.stride() == wide.stride()
