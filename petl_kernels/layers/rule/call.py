"""What one forward pass of a layer keeps, and what its backward pass collects."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.dispatch import active
from petl_kernels.layers.boundaries import Boundaries
from petl_kernels.ops import philox

# Name of what is kept -> the last tier that keeps it. ``adapted_...`` are the exceptions of the package's table.
KEPT = {
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
    "q": 1,
    "k": 1,
    "v": 1,
    "z": 1,
    "gate": 1,
    "hidden": 1,
}


class Place:
    """Where a block keeps something: its key, and the last tier that keeps it."""

    __slots__ = ("key", "last")

    def __init__(self, block: str, name: str):
        self.key, self.last = f"{block}.{name}", KEPT[name.rstrip("0123456789")]


class Call:
    """One forward pass: its tier, seeds and dtypes, and the tensors that it keeps, by "<block>.<name>".

    dtype: that of products; None where x has it already. backend: what ``ops.use`` asks for.
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
        "seeds",
        "kept",
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
        self.seeds: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def keep(self, place: Place, tensor: Tensor) -> None:
        """Keeps ``tensor`` for backward where the tier does; the first one, where backward makes it again."""
        if 0 < self.tier <= place.last:
            self.kept.setdefault(place.key, tensor)

    @property
    def keeps_some(self) -> bool:
        """Whether anything but the layer's input may be kept."""
        return 0 < self.tier < 4

    def seed(self, name: str, rate: float) -> Tensor | None:
        """Returns the seed of the dropout called ``name``: drawn in the first forward pass, the same in another."""
        if rate == 0:
            return None
        seed = self.seeds.get(name)
        if seed is None:
            seed = self.seeds[name] = philox.draw_seed(self.device)
        return seed

    def again(self, kept: dict[str, Tensor]) -> Call:
        """Returns this pass with ``kept`` in the place of what it has kept."""
        call = object.__new__(Call)
        for name in self.__slots__:
            setattr(call, name, getattr(self, name))
        call.kept = kept
        return call

    def cast(self, x: Tensor) -> Tensor:
        """Returns x as products read it."""
        return x if self.dtype is None else x.to(self.dtype)


class Gradients:
    """The gradients of the trained tensors of a layer, in their own dtypes."""

    __slots__ = ("wanted", "found")

    def __init__(self, wanted: list[Tensor]):
        self.wanted = {id(tensor) for tensor in wanted}
        self.found: dict[int, Tensor] = {}

    def wants(self, tensor: Tensor | None) -> bool:
        return tensor is not None and id(tensor) in self.wanted

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of ``tensor``, where it is wanted."""
        key = id(tensor)
        if key not in self.wanted:
            return
        if gradient.dtype != tensor.dtype:
            gradient = gradient.to(tensor.dtype)
        if gradient.shape != tensor.shape:
            gradient = gradient.view(tensor.shape)
        before = self.found.get(key)
        self.found[key] = gradient if before is None else before + gradient

    def of(self, tensor: Tensor) -> Tensor | None:
        return self.found.get(id(tensor))


def summed(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Returns the sum of two gradients of one tensor, either of which may be missing. It writes into the first."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def joined(du: Tensor, dx: Tensor) -> Tensor:
    """Returns du + dx in the dtype of dx, for one x that is read twice. It writes into du where that has this dtype."""
    return du.to(dx.dtype).add_(dx)
