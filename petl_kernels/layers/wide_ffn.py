"""Frozen feed-forward weights with room for a parallel adapter, so that both are one network (``ops.parallel_ffn``).

The weights of the two linears stand at the front of buffers that have room for the adapter's rows and columns behind
them. The old weights are freed; the room takes (2d + 1) · p elements of the weights' dtype for p = ``room(m)``, with
the adapter's bottleneck m and the layer's width d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.buffers import Buffers, are_dense, are_frozen, parameters_of
from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.layers.pieces import active_piece
from petl_kernels.methods.adapter import ParallelAdapter
from petl_kernels.models.structure import Layer
from petl_kernels.models.transformers_names import activation_of
from petl_kernels.ops.parallel_ffn import room, with_room


class WideFFN(Buffers):
    """Weight (f, d) and bias (f,) of ``first`` and the weight (d, f) of ``out`` in w1 (f + p, d), c1 (f + p,) and
    w2 (d, f + p).

    The room is that of one adapter: between its forward and backward pass only its own values are written there.
    """

    @torch.inference_mode(False)  # or the parameters could not be trained through later
    def __init__(self, first: nn.Linear, out: nn.Linear, adapter: ParallelAdapter):
        self.modules = first, out, adapter
        self.has_bias, f = first.bias is not None, first.out_features
        bias = first.bias.detach() if self.has_bias else None
        made: tuple[Tensor, Tensor, Tensor] = with_room(
            first.weight.detach(), bias, out.weight.detach(), adapter.down.out_features
        )
        self.w1, self.c1, self.w2 = made
        biases = [(first, "bias", self.c1[:f])] if self.has_bias else []
        self.move_in([(first, "weight", self.w1[:f]), *biases, (out, "weight", self.w2[:, :f])])

    def serves(self, *modules: nn.Module | None) -> bool:
        """Returns whether ``modules`` are those of the beginning, frozen, with their weights still in here."""
        return modules == self.modules and self._is_usable()

    def _is_usable(self) -> bool:
        first, out, _ = self.modules
        has_same_bias = self.has_bias or first.bias is None
        return has_same_bias and are_frozen(parameters_of(first, out)) and self.is_held()

    def moved(self) -> WideFFN | None:
        """Returns buffers for the weights where these have gone to another device or dtype; None where none can be."""
        if self.w1 is None or not _can_be_wide(*self.modules[:2]):
            return None
        return self if self._is_usable() else WideFFN(*self.modules)

    def undo(self) -> None:
        super().undo()
        nothing: Any = None  # nobody reads them when nothing is held
        self.w1 = self.c1 = self.w2 = nothing


def bottleneck_beside(model: nn.Module, layer: Layer) -> int:
    """Returns the bottleneck of the active parallel adapter of ``layer`` that can run inside of its network, or 0."""
    linears: list[Any] = [model.get_submodule(path) for path in layer.ffn.linears]
    if not linears:
        return 0
    piece = active_piece(linears[-1])
    if type(piece) is not ParallelAdapter or len(linears) != 2 or not _can_be_wide(*linears):
        return 0
    same = piece.activation == activation_of(model.get_submodule(layer.path))
    return piece.down.out_features if same else 0


def room_bytes(model: nn.Module, layer: Layer) -> int:
    """Returns the bytes that ``WideFFN`` will take for ``layer`` beside its weights."""
    first: Any = model.get_submodule(layer.ffn.inputs[0])
    hidden = room(bottleneck_beside(model, layer))
    biases = hidden + (first.out_features if hidden and first.bias is None else 0)
    return (2 * hidden * first.in_features + biases) * first.weight.dtype.itemsize


def _can_be_wide(first: nn.Linear, out: nn.Linear) -> bool:
    """Returns whether both are linears of PyTorch or this package, with frozen dense weights of one dtype."""
    if not all(type(linear) in (nn.Linear, FrozenLinear) for linear in (first, out)):
        return False
    tensors = parameters_of(first, out)
    return are_frozen(tensors) and are_dense(tensors) and len({tensor.dtype for tensor in tensors}) == 1
