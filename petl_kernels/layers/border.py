"""Frozen weights of linears that read one input, in one buffer with room for their adapters (``ops.lora_border``).

q, k and v of a self-attention stand in one, k and v of a cross-attention in another, and its q, where it has LoRA. The
weights move there once, and the parameters become views of it. Bytes: the old weights go, and the room is there beside
them, R · (N + K + R) elements for R of ``room_for``. A layer's rule has one bias of N beside its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.methods.ia3 import Scale
from petl_kernels.methods.lora import LoRALinear
from petl_kernels.models.structure import Layer
from petl_kernels.ops.lora_border import room
from petl_kernels.ops.quantized import QuantizedTensor

# Kinds of devices whose layers have borders. A CPU gains nothing by them (bench/NOTES.md); tests add it.
DEVICES = {"cuda"}
_KIND: ContextVar[str | None] = ContextVar("petl_border_device", default=None)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Models that become lean have the borders that they would have on a kind of device, wherever their weights are."""
    token = _KIND.set(device)
    try:
        yield
    finally:
        _KIND.reset(token)


class Border:
    """The weights (N_g, K) of ``linears`` in a buffer (N + R, K + R), one below the other.

    They stay the parameters of their modules. A copy of the model has tensors of its own, and no such object. What is
    in the room belongs to nobody: each use writes what it reads.
    """

    @torch.inference_mode(False)  # or the parameters could not be trained through later
    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = tuple(linears)
        first, r = linears[0].weight.detach(), room_for(linears)
        outputs = sum(linear.out_features for linear in linears)
        self.buffer: Tensor | None = first.new_zeros(outputs + r, first.shape[1] + r)
        # Written before each use, like the room; it stays as long as the buffer, for captured graphs write there.
        has_bias = any(linear.bias is not None for linear in linears)
        self.bias: Tensor | None = first.new_zeros(outputs) if has_bias else None
        for linear, place in self._places():
            place.copy_(linear.weight.detach())
            linear.weight.data = place

    def _places(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        row = 0
        for linear in self.linears:
            n, k = linear.out_features, linear.in_features
            yield linear, self.buffer[row : row + n, :k]
            row += n

    def serves(self, linears: Sequence[nn.Module]) -> bool:
        """Whether ``linears`` are those of the beginning, frozen and still in here."""
        return self.buffer is not None and tuple(linears) == self.linears and self._holds()

    def _holds(self) -> bool:
        return all(not linear.weight.requires_grad and _is_at(linear.weight, place) for linear, place in self._places())

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Give the memory back; what is still in it gets tensors of its own, as an optimiser expects of a parameter."""
        if self.buffer is None:
            return
        for linear, place in self._places():
            if _is_at(linear.weight, place):
                linear.weight.data = place.clone(memory_format=torch.contiguous_format)
        self.buffer = self.bias = None

    def __reduce__(self):
        return type(None), ()


def renew(borders: dict[str, Border], groups: dict[str, Sequence[nn.Module]]) -> None:
    """Bring ``borders`` up to date with ``groups`` of linears that read one input: what serves stays."""
    for name, border in list(borders.items()):
        if name not in groups or not _serves_all(border, groups[name]):
            borders.pop(name).undo()
    for name, linears in groups.items():
        if name not in borders and wants_border(linears):
            borders[name] = Border(linears)


def _serves_all(border: Border, linears: Sequence[nn.Module]) -> bool:
    """Also the adapters that have come since. Where it has become of no use it stays: to move weights is not free."""
    return border.serves(linears) and border.buffer.shape[1] - linears[0].in_features >= room_for(linears)


def wants_border(linears: Sequence[nn.Module], device: str | None = None) -> bool:
    """Whether one product for ``linears`` saves something, and can be: frozen dense weights of one kind, and no dropout
    in front of an adapter. device: the kind that they will be on, where they are not there yet."""
    if not all(type(linear) in (nn.Linear, LoRALinear, FrozenLinear) for linear in linears):
        return False
    weights, pieces = [linear.weight for linear in linears], [piece for linear in linears for piece in _lora(linear)]
    if any(isinstance(weight, QuantizedTensor) or weight.requires_grad for weight in weights):
        return False
    if len({id(weight) for weight in weights}) < len(weights):
        return False
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return False
    if (device or _KIND.get() or weights[0].device.type) not in DEVICES:
        return False
    if any(piece.stored_dropout > 0 for piece in pieces) or any(map(_is_scaled, linears)):
        return False
    return len(linears) > 1 or bool(pieces)


def _lora(linear: nn.Module) -> list[nn.Module]:
    """All that are there, active or not: what choosing one would move is missing in a backward pass still to come."""
    return list(linear.lora.values()) if type(linear) is LoRALinear else []


def _is_scaled(linear: nn.Module) -> bool:
    return hasattr(linear, "petl") and any(isinstance(piece, Scale) for piece in linear.petl.values())


def room_for(linears: Sequence[nn.Module]) -> int:
    """Returns R, for the adapter with the highest ranks: choosing another one then moves nothing."""
    ranks: dict[str, int] = {}
    for linear in linears:
        for name, piece in linear.lora.items() if type(linear) is LoRALinear else ():
            ranks[name] = ranks.get(name, 0) + piece.A.shape[0]
    return room(max(ranks.values(), default=0))


def border_bytes(model: nn.Module, layer: Layer, device: str) -> int:
    """What borders will take for ``layer`` on a kind of device, beside its weights."""
    total = 0
    for paths in groups_of(layer.attentions).values():
        linears = [model.get_submodule(path) for path in paths]
        if wants_border(linears, device):
            r, n, k = room_for(linears), sum(linear.out_features for linear in linears), linears[0].in_features
            biases = n if any(linear.bias is not None for linear in linears) else 0
            total += (r * (n + k + r) + biases) * linears[0].weight.dtype.itemsize
    return total


def groups_of(attentions: Sequence) -> dict[str, tuple]:
    """The q, k and v of a layer's attentions that read one input, by the name of their block."""
    first, *others = attentions
    groups = {"self.qkv": (first.q, first.k, first.v)}
    for cross in others:
        groups |= {"cross.q": (cross.q,), "cross.kv": (cross.k, cross.v)}
    return groups


def _is_at(parameter: Tensor, place: Tensor) -> bool:
    if isinstance(parameter, QuantizedTensor) or (parameter.device, parameter.dtype) != (place.device, place.dtype):
        return False
    same = parameter.untyped_storage()._cdata == place.untyped_storage()._cdata
    return same and parameter.storage_offset() == place.storage_offset() and parameter.stride() == place.stride()
