"""The tensors that one forward pass of a layer saves, and the gradients that its backward pass collects."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from petl_kernels.dispatch import active
from petl_kernels.layers.boundaries import Boundaries
from petl_kernels.layers.rotary import Rotary
from petl_kernels.ops import philox

# Name of a tensor -> the last tier that saves it. ``adapted_...`` are the exceptions of the package's table.
SAVED = {
    "mean": 3,
    "rstd": 3,
    "latent": 3,
    "o": 3,
    "lse": 3,
    "bits": 3,
    "adapted_read": 3,
    "end": 3,
    "sum": 2,
    "read": 2,
    "adapted_sum": 1,
    "normed_sum": 0,
    "q": 1,
    "k": 1,
    "v": 1,
    "z": 1,
    "gate": 1,
    "hidden": 1,
}


class Place:
    """A tensor that a block may save: its key, and the last tier that saves it."""

    __slots__ = ("key", "last")

    def __init__(self, block: str, name: str):
        self.key, self.last = f"{block}.{name}", SAVED[name.rstrip("0123456789")]


class Call:
    """One forward pass: its tier, seeds and dtypes, and the tensors that it saves, by "<block>.<name>".

    dtype: that of products; None where x has it already. backend: the one that ``ops.use`` has chosen. norms: the norms
    of rows that DoRA divides by, of each linear that has it.
    """

    __slots__ = (
        "tier",
        "backend",
        "dtype",
        "device",
        "masks",
        "biases",
        "boundaries",
        "causal",
        "prefixes",
        "rotary",
        "seeds",
        "norms",
        "saved",
    )

    def __init__(self, tier: int, x: Tensor):
        self.tier, self.backend, self.device = tier, active(), x.device
        self.dtype = None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(x.device.type)
        self.masks: dict[str, Tensor | None] = {}
        self.biases: dict[str, Tensor | None] = {}
        self.boundaries: dict[str, Boundaries] = {}
        self.causal: dict[str, bool] = {}
        self.prefixes: dict[str, tuple[Tensor, Tensor]] = {}
        self.rotary: Rotary | None = None
        self.seeds: dict[str, Tensor] = {}
        self.norms: dict[object, Tensor] = {}
        self.saved: dict[str, Tensor] = {}

    def save(self, place: Place, tensor: Tensor) -> None:
        """Saves ``tensor`` where the tier does; one that is there already, of the forward pass, stays."""
        if 0 < self.tier <= place.last:
            self.saved.setdefault(place.key, tensor)

    @property
    def saves_some(self) -> bool:
        """Whether anything but the layer's input may be saved."""
        return 0 < self.tier < 4

    def seed(self, name: str, rate: float) -> Tensor | None:
        """Returns the seed of the dropout called ``name``, drawn at its first use; None for a rate of 0."""
        if rate == 0:
            return None
        seed = self.seeds.get(name)
        if seed is None:
            seed = self.seeds[name] = philox.draw_seed(self.device)
        return seed

    def for_backward(self, saved: dict[str, Tensor]) -> Call:
        """Returns this pass with ``saved`` in the place of its own saved tensors."""
        call = object.__new__(Call)
        for name in self.__slots__:
            setattr(call, name, getattr(self, name))
        call.saved = saved
        return call

    def cast(self, x: Tensor) -> Tensor:
        """Returns x in the dtype of products."""
        return x if self.dtype is None else x.to(self.dtype)


class Gradients:
    """The gradients of the trained tensors of a layer, in their own dtypes."""

    __slots__ = ("wanted", "found")

    def __init__(self, wanted: list[Tensor]):
        self.wanted = {id(tensor) for tensor in wanted}
        self.found: dict[int, Tensor] = {}

    def wants(self, tensor: Tensor | None) -> bool:
        return tensor is not None and id(tensor) in self.wanted

    def add(self, tensor: Tensor | None, gradient: Tensor) -> None:
        """Adds to the gradient of ``tensor``, where it is wanted."""
        key = id(tensor)
        if tensor is None or key not in self.wanted:
            return
        if gradient.dtype != tensor.dtype:
            gradient = gradient.to(tensor.dtype)
        if gradient.shape != tensor.shape:
            gradient = gradient.view(tensor.shape)
        before = self.found.get(key)
        self.found[key] = gradient if before is None else before + gradient

    def of(self, tensor: Tensor) -> Tensor | None:
        return self.found.get(id(tensor))


@overload
def summed(total: Tensor, more: Tensor | None) -> Tensor: ...
@overload
def summed(total: Tensor | None, more: Tensor | None) -> Tensor | None: ...
def summed(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Returns the sum of two gradients of one tensor, either of which may be None, and writes it into the first."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def joined(du: Tensor, dx: Tensor) -> Tensor:
    """Returns du + dx in the dtype of dx, for an x that is read twice, and writes into a du of that dtype."""
    return du.to(dx.dtype).add_(dx)
