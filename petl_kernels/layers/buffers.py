"""Frozen weights that stand in larger tensors, with room for an adapter beside them.

The weights move there once, and the parameters become views. They stay the parameters of their modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.ops.quantized import QuantizedTensor

Place = tuple[Any, str, Tensor]  # a module, the name of its parameter, the part of a buffer for that


class Buffers:
    """Larger tensors, with parameters of some modules in them. A copy of a model has weights of its own and no buffers.

    places: where the parameters stand; empty once the memory is free.
    """

    places: list[Place] = []

    def move_in(self, places: list[Place]) -> None:
        """Makes the parameters views of their places, which have their values already."""
        self.places = places
        for module, name, place in places:
            getattr(module, name).data = place

    def is_held(self) -> bool:
        """Returns whether all parameters are still in their places."""
        return bool(self.places) and all(_is_at(getattr(module, name), place) for module, name, place in self.places)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Frees the memory. Parameters that are still in it get tensors of their own, as optimisers expect them."""
        for module, name, place in self.places:
            parameter = getattr(module, name)
            if _is_at(parameter, place):
                parameter.data = place.clone(memory_format=torch.contiguous_format)
        self.places = []


def _is_at(parameter: Tensor | None, place: Tensor) -> bool:
    if parameter is None or isinstance(parameter, QuantizedTensor):
        return False
    if (parameter.device, parameter.dtype) != (place.device, place.dtype):
        return False
    same = parameter.untyped_storage()._cdata == place.untyped_storage()._cdata
    return same and parameter.storage_offset() == place.storage_offset() and parameter.stride() == place.stride()


def parameters_of(*linears: nn.Linear) -> list[Tensor]:
    """Returns the weights and biases of ``linears``."""
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]


def are_frozen(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no tensor requires grad."""
    return not any(tensor.requires_grad for tensor in tensors)


def are_dense(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no tensor is quantized."""
    return not any(isinstance(tensor, QuantizedTensor) for tensor in tensors)
