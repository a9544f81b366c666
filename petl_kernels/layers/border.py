"""Frozen weights of linears that read one input, in one buffer with room for their adapters (``ops.lora_border``).

q, k and v of a self-attention stand in one buffer, k and v of a cross-attention in another, and its q in a third where
it has LoRA. The old weights are freed; the room takes R · (N + K + R) elements of the weights' dtype, with N outputs in
all, K inputs and R of ``room_for``. One bias of N elements is beside it where a linear has a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.buffers import Buffers, Place, are_dense, are_frozen
from petl_kernels.layers.pieces import LINEARS
from petl_kernels.methods.ia3 import Scale
from petl_kernels.methods.lora import LoRALinear, LowRank
from petl_kernels.methods.ssf import ScaleShift
from petl_kernels.models.structure import Layer
from petl_kernels.ops.lora_border import room

# Kinds of devices whose layers have borders. A CPU gains nothing by them (bench/NOTES.md); tests add it.
DEVICES = {"cuda"}
_KIND: ContextVar[str | None] = ContextVar("petl_border_device", default=None)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Gives models that become lean in this block the borders of a kind of device, wherever their weights are."""
    token = _KIND.set(device)
    try:
        yield
    finally:
        _KIND.reset(token)


class Border(Buffers):
    """The weights (N_g, K) of ``linears`` in a buffer (N + R, K + R), one below the other.

    The room has no values of its own: each use writes what it reads. So does the bias (N,), which stays as long as the
    buffer, since captured graphs write there.
    """

    @torch.inference_mode(False)  # or the parameters could not be trained through later
    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = tuple(linears)
        first, r = linears[0].weight.detach(), room_for(linears)
        outputs = sum(linear.out_features for linear in linears)
        self.buffer = first.new_zeros(outputs + r, first.shape[1] + r)
        has_bias = any(linear.bias is not None for linear in linears)
        self.bias: Tensor | None = first.new_zeros(outputs) if has_bias else None
        places = self._places()
        for linear, _, place in places:
            place.copy_(linear.weight.detach())
        self.move_in(places)

    def _places(self) -> list[Place]:
        places: list[Place] = []
        row = 0
        for linear in self.linears:
            n, k = linear.out_features, linear.in_features
            places.append((linear, "weight", self.buffer[row : row + n, :k]))
            row += n
        return places

    def serves(self, linears: Sequence[Any]) -> bool:
        """Returns whether ``linears`` are those of the beginning, with frozen weights that are still in here."""
        return tuple(linears) == self.linears and are_frozen(own.weight for own in linears) and self.is_held()

    def undo(self) -> None:
        super().undo()
        nothing: Any = None  # nobody reads it when nothing is held
        self.buffer, self.bias = nothing, None


def renew(borders: dict[str, Border], groups: Mapping[str, Sequence[Any]]) -> None:
    """Brings ``borders`` up to date with ``groups`` of linears that read one input; a border that serves stays."""
    for name, border in list(borders.items()):
        if name not in groups or not _serves_all(border, groups[name]):
            borders.pop(name).undo()
    for name, linears in groups.items():
        if name not in borders and wants_border(linears):
            borders[name] = Border(linears)


def _serves_all(border: Border, linears: Sequence[nn.Linear]) -> bool:
    """Returns whether ``border`` has room for all adapters of ``linears``, those that have come since included.

    One that has become of no use stays: to move weights is not free.
    """
    return border.serves(linears) and border.buffer.shape[1] - linears[0].in_features >= room_for(linears)


def wants_border(linears: Sequence[nn.Linear], device: str | None = None) -> bool:
    """Returns whether one product for ``linears`` saves something and is possible: their weights are frozen, dense and
    of one dtype, device and input, and no adapter of theirs has dropout or is DoRA.

    device: the kind that they will be on, where they are not there yet.
    """
    if not all(type(linear) in LINEARS for linear in linears):
        return False
    weights, pieces = (
        [linear.weight for linear in linears],
        [piece for linear in linears for piece in _lora(linear).values()],
    )
    if not are_dense(weights) or not are_frozen(weights) or len({id(weight) for weight in weights}) < len(weights):
        return False
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return False
    if (device or _KIND.get() or weights[0].device.type) not in DEVICES:
        return False
    if any(piece.stored_dropout > 0 or piece.magnitude is not None for piece in pieces):
        return False
    if any(map(_is_scaled, linears)):
        return False
    return len(linears) > 1 or bool(pieces)


def _lora(linear: nn.Linear) -> Mapping[str, LowRank]:
    """Returns the LoRA pieces of all adapters, by name: weights that the choice of another adapter would move are not
    there for a backward pass still to come."""
    if type(linear) is not LoRALinear:
        return {}
    own: Any = linear.lora
    return own


def _is_scaled(linear: Any) -> bool:
    return hasattr(linear, "petl") and any(isinstance(piece, (Scale, ScaleShift)) for piece in linear.petl.values())


def room_for(linears: Sequence[nn.Linear]) -> int:
    """Returns R, for the adapter with the highest ranks: the choice of another one then moves nothing."""
    ranks: dict[str, int] = {}
    for linear in linears:
        for name, piece in _lora(linear).items():
            ranks[name] = ranks.get(name, 0) + piece.A.shape[0]
    return room(max(ranks.values(), default=0))


def border_bytes(model: nn.Module, layer: Layer, device: str) -> int:
    """Returns the bytes that borders will take for ``layer`` on a kind of device, beside its weights."""
    total = 0
    for paths in groups_of(layer.attentions).values():
        linears: list[Any] = [model.get_submodule(path) for path in paths]
        if wants_border(linears, device):
            r, n, k = room_for(linears), sum(linear.out_features for linear in linears), linears[0].in_features
            biases = n if any(linear.bias is not None for linear in linears) else 0
            total += (r * (n + k + r) + biases) * linears[0].weight.dtype.itemsize
    return total


def groups_of(attentions: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Returns the q, k and v of a layer's attentions that read one input, by the name of their group."""
    first, *others = attentions
    groups = {"self.qkv": (first.q, first.k, first.v)}
    for cross in others:
        groups |= {"cross.q": (cross.q,), "cross.kv": (cross.k, cross.v)}
    return groups
