"""Saved tensors that are made again instead of kept.

Autograd keeps whatever its rules ask for between forward and backward. Inside ``saving()``, a tensor that came out of
``recomputed(fn, *inputs)`` is not kept: its place takes a recipe, which is ``fn`` and the inputs, and those are kept or
have recipes themselves. What a layer keeps is then a matter of which of its steps it runs through ``recomputed``; the
rules of the ops, of adapters and of plain PyTorch stay as they are, and so do the gradients, bit for bit.

A recipe runs without autograd, under the autocast state and with the dropout seeds of its forward pass. Its results
live until the last of those who saved them has asked: k, v and the projections of one layer share one normalised input.
It reads modules when backward arrives: ``Seen`` refuses one that is no longer what the forward pass saw.

``checkpointed`` keeps the inputs of a whole layer only; ``host_copy`` holds the first of them in host memory.

Each thread has its own recipes, so that several can run one model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from petl_kernels.accounting.saved import observers
from petl_kernels.layers.host_copy import host_copy
from petl_kernels.layers.seen import Seen
from petl_kernels.ops import philox


class _Made(threading.local):
    """Storage -> its recipe, as long as the storage lives. The weak reference keeps its address from being used again.

    ``layer`` is the lean layer that this thread is in; errors name its path.
    """

    def __init__(self):
        self.recipes: dict[int, tuple[StorageWeakRef, Recipe, int]] = {}
        self.layer: nn.Module | None = None


_made = _Made()


class Kept:
    """A tensor that is kept as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that is kept for backward was changed in place: "
                f"it is at version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor


class Remade:
    """A view into one output of a recipe."""

    __slots__ = ("recipe", "index", "geometry")

    def __init__(self, recipe: Recipe, index: int, tensor: Tensor):
        self.recipe, self.index = recipe, index
        self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
        recipe.pending += 1

    def get(self) -> Tensor:
        return self.recipe.take(self.index).as_strided(*self.geometry)


class Recipe:
    """How the tensors that ``fn`` returns are made again.

    reads: the modules that it looks into. weights: parameters that it gets after its inputs, as they are now.
    """

    __slots__ = ("fn", "inputs", "seen", "seeds", "autocast", "pending", "outputs", "__weakref__")

    def __init__(
        self, fn: Callable, inputs: tuple[Tensor, ...], reads: tuple[nn.Module, ...], weights: tuple[Tensor, ...] = ()
    ):
        self.fn, self.inputs = fn, [*map(_capture, inputs), *map(Kept, weights)]
        self.seen = Seen(reads, _made.layer)
        self.seeds: list[Tensor] = []
        self.autocast = _autocast_state(inputs[0].device.type)
        self.pending = 0  # how many will still ask
        self.outputs: tuple[Tensor, ...] | None = None

    def take(self, index: int) -> Tensor:
        outputs = self.outputs  # in a variable: two threads may go back through one graph
        if outputs is None:
            self.outputs = outputs = self._run()
        self.pending -= 1
        if self.pending <= 0:
            self.outputs = None
        return outputs[index]

    def _run(self) -> tuple[Tensor, ...]:
        self.seen.check()
        inputs = [held.get() for held in self.inputs]
        device, enabled, dtype = self.autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled), philox.replaying(self.seeds):
            outputs = self.fn(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def recomputed(fn: Callable, *inputs: Tensor, reads: tuple[nn.Module, ...] = ()) -> Tensor | tuple[Tensor, ...]:
    """``fn(*inputs)``, whose outputs are made again where autograd would keep them.

    fn: a function of tensors to a tensor or a tuple of tensors, each with a storage of its own, that draws no random
    numbers but the seeds of the package's dropout, and that does nothing else. reads: the modules whose parameters,
    adapters and settings it uses; backward raises RuntimeError where they have changed.
    """
    if not torch.is_grad_enabled():
        return fn(*inputs)
    recipe = Recipe(fn, inputs, reads)
    with philox.recording() as recipe.seeds:
        outputs = fn(*inputs)
    for index, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
        _register(output, recipe, index)
    return outputs


def remade_by(fn: Callable, output: Tensor, *inputs: Tensor, weights: tuple[Tensor, ...] = ()) -> Tensor:
    """``output``, which ``fn(*inputs, *weights)`` makes again where autograd would keep it; bit for bit the same.

    weights: parameters, whose memory is there anyway.
    """
    if torch.is_grad_enabled():
        _register(output, Recipe(fn, inputs, (), weights), 0)
    return output


def _register(output: Tensor, recipe: Recipe, index: int) -> None:
    storage = output.untyped_storage()
    _made.recipes[storage._cdata] = StorageWeakRef(storage), recipe, index


def _capture(tensor: Tensor) -> Kept | Remade:
    found = _made.recipes.get(tensor.untyped_storage()._cdata)
    if found is not None and not found[0].expired():
        return Remade(found[1], found[2], tensor)
    _observe(tensor)
    return Kept(tensor)


def _observe(tensor: Tensor) -> None:
    for observe in observers:
        observe(tensor)


@contextmanager
def saving(layer: nn.Module | None = None) -> Iterator[None]:
    """What autograd saves in this block is kept, or has a recipe where it came out of ``recomputed``.

    layer: the one that runs in the block, whose path errors name.
    """
    if not torch.is_grad_enabled():
        yield
        return
    outer, _made.layer = _made.layer, layer
    try:
        with torch.autograd.graph.saved_tensors_hooks(_capture, lambda held: held.get()):
            yield
    finally:
        _made.layer = outer


def forget() -> None:
    """Drop this thread's recipes of tensors that are gone. Called when a layer has returned."""
    recipes = _made.recipes
    for address in [address for address, (storage, *_) in recipes.items() if storage.expired()]:
        del recipes[address]


def forget_all() -> None:
    """Drop all of this thread's recipes, with what they hold. Called when a layer has failed."""
    _made.recipes.clear()


def _autocast_state(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


# ---- whole layers ---------------------------------------------------------------------------------------------------


def checkpointed(layer: nn.Module, fn: Callable, x: Tensor, *inputs, offload: bool = False):
    """``fn(x, *inputs)``, of which only the inputs are kept; ``offload``: x in host memory.

    Everything between is computed again when backward arrives, with the same random numbers. fn reads ``layer``, which
    must be then as it is now: backward raises RuntimeError where it is not.
    """
    for tensor in inputs if offload else (x, *inputs):
        if isinstance(tensor, Tensor):
            _observe(tensor)
    if not torch.compiler.is_compiling():  # which bind to a graph what they read
        fn = _Repeated(layer, fn)
    if not offload:
        return checkpoint(fn, x, *inputs, use_reentrant=False)
    held = host_copy(x)
    output = checkpoint(lambda *rest: fn(held.get(), *rest), *inputs, use_reentrant=False)
    held.leave()
    return output


class _Repeated:
    """``fn``, which may run again as long as ``layer`` is what its first run saw."""

    def __init__(self, layer: nn.Module, fn: Callable):
        self.fn, self.seen, self.ran = fn, Seen((layer,), layer, graph=True), False

    def __call__(self, *inputs):
        if self.ran:
            self.seen.check()
        self.ran = True
        return self.fn(*inputs)


def maybe(again: bool, fn: Callable, *inputs: Tensor, reads: tuple[nn.Module, ...] = ()):
    """``recomputed(fn, *inputs)``, or plainly ``fn(*inputs)`` when its output is kept."""
    return recomputed(fn, *inputs, reads=reads) if again else fn(*inputs)


def context(lean: bool, layer: nn.Module):
    """``saving()`` for a lean layer; nothing for one inside a checkpoint, which has hooks of its own."""
    return saving(layer) if lean else nullcontext()
