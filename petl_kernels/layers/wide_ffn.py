"""Frozen feed-forward weights with room for a parallel adapter, so that both are one network (``ops.parallel_ffn``).

The weights of the two linears move, once, to the front of buffers that have the adapter's rows and columns behind them;
the parameters become views of those. Bytes: the old weights go, and the room is there beside them, (2d + 1) · p
elements of the weights' dtype for p = ``room(m)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import activation_of
from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.methods.adapter import ParallelAdapter
from petl_kernels.models.structure import Layer
from petl_kernels.ops.parallel_ffn import room, with_room
from petl_kernels.ops.quantized import QuantizedTensor


class WideFFN:
    """Weight and bias of ``first``, (f, d) and (f,), and the weight of ``out``, (d, f), inside larger tensors:
    w1 (f + p, d), c1 (f + p,), w2 (d, f + p).

    They stay the parameters of their modules. A copy of the model has tensors of its own, and no such object. The room
    is that of one adapter: between its forward and backward pass nothing but its own values is written there.
    """

    @torch.inference_mode(False)  # or the parameters could not be trained through later
    def __init__(self, first: nn.Linear, out: nn.Linear, adapter: ParallelAdapter):
        self.modules = first, out, adapter
        self.has_bias, m = first.bias is not None, adapter.down.out_features
        self.w1, self.c1, self.w2 = with_room(first.weight.detach(), _detached(first.bias), out.weight.detach(), m)
        for parameter, wide in self._pairs():
            parameter.data = wide[tuple(map(slice, parameter.shape))]

    def _pairs(self) -> list[tuple[Tensor | None, Tensor]]:
        """(parameter, where it should be), empty once the memory is free."""
        if self.w1 is None:
            return []
        first, out, _ = self.modules
        bias = [(first.bias, self.c1)] if self.has_bias or first.bias is not None else []
        return [(first.weight, self.w1), *bias, (out.weight, self.w2)]

    def serves(self, *modules: nn.Module) -> bool:
        """Whether ``modules`` are those of the beginning, frozen and still in here; frees the memory where not."""
        if self.w1 is not None and not (modules == self.modules and self._holds()):
            self.undo()
        return self.w1 is not None

    def _holds(self) -> bool:
        return _are_frozen(*self.modules[:2]) and all(_is_inside(*pair) for pair in self._pairs())

    def moved(self) -> WideFFN | None:
        """The same for weights that have gone elsewhere, to another device or dtype; None where that cannot be."""
        if self.w1 is None or not _have_room(*self.modules[:2]):
            return None
        return self if self._holds() else WideFFN(*self.modules)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Free the memory; what is still in it gets tensors of its own, as an optimiser expects of a parameter."""
        for parameter, wide in self._pairs():
            if _is_inside(parameter, wide):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.w1 = self.c1 = self.w2 = None

    def __reduce__(self):
        return type(None), ()


def bottleneck_beside(model: nn.Module, layer: Layer) -> int:
    """The bottleneck of the active parallel adapter of ``layer`` that can be a part of its network; 0 for none."""
    linears = [model.get_submodule(path) for path in layer.ffn.linears]
    piece = linears[-1].petl.current() if hasattr(linears[-1], "petl") else None
    if type(piece) is not ParallelAdapter or len(linears) != 2 or not _have_room(*linears):
        return 0
    same = piece.activation == activation_of(model.get_submodule(layer.path))
    return piece.down.out_features if same else 0


def room_bytes(model: nn.Module, layer: Layer) -> int:
    """What ``WideFFN`` will take for ``layer`` beside its weights."""
    first = model.get_submodule(layer.ffn.inputs[0])
    hidden = room(bottleneck_beside(model, layer))
    biases = hidden + (first.out_features if hidden and first.bias is None else 0)
    return (2 * hidden * first.in_features + biases) * first.weight.dtype.itemsize


def _have_room(first: nn.Module, out: nn.Module) -> bool:
    """Whether the two are frozen linears with dense weights of one dtype, and no kind of their own."""
    if not all(type(linear) in (nn.Linear, FrozenLinear) for linear in (first, out)) or not _are_frozen(first, out):
        return False
    tensors = _tensors(first, out)
    return len({t.dtype for t in tensors}) == 1 and not any(isinstance(t, QuantizedTensor) for t in tensors)


def _are_frozen(first: nn.Module, out: nn.Module) -> bool:
    return not any(tensor.requires_grad for tensor in _tensors(first, out))


def _tensors(*linears: nn.Module) -> list[Tensor]:
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _is_inside(parameter: Tensor | None, wide: Tensor) -> bool:
    """At the front of ``wide``, in its memory."""
    if parameter is None or isinstance(parameter, QuantizedTensor):
        return False
    if (parameter.device, parameter.dtype) != (wide.device, wide.dtype):
        return False
    same = parameter.untyped_storage()._cdata == wide.untyped_storage()._cdata
    return same and parameter.storage_offset() == 0 and parameter.stride() == wide.stride()
