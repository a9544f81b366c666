"""Saved tensors that are recomputed.

Autograd saves the tensors that its rules need. Inside ``saving()`` the result of ``recomputed(fn, *inputs)`` is not
saved: a recipe takes its place, which is ``fn`` and the inputs, and those are saved or have recipes themselves. So the
choice of steps that run through ``recomputed`` is the choice of what a layer saves. The rules of the ops, of adapters
and of plain PyTorch stay as they are, and so do the gradients, bit for bit.

A recipe runs without autograd, under the autocast state and with the dropout seeds of its forward pass. Its results
live until the last tensor that stands for one of them is read: k, v and the projections of one layer share one
normalised input. A recipe reads modules during backward; ``Seen`` refuses one that has changed since the forward pass.

``checkpointed`` saves the inputs of a whole layer only; ``host_copy`` holds the first of them in host memory.

Each thread has its own recipes, so that several can run one model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from petl_kernels.accounting.saved import observers
from petl_kernels.layers.host_copy import host_copy
from petl_kernels.layers.seen import Seen
from petl_kernels.ops import philox

Outputs = TypeVar("Outputs")  # a tensor, or a tuple of tensors


class _OfThread(threading.local):
    """recipes: by address of a storage that one of them makes, as long as the storage lives. The weak reference keeps
    the address from being used again. layer: the lean layer that the thread is in; errors name its path."""

    def __init__(self):
        self.recipes: dict[int, tuple[StorageWeakRef, Recipe, int]] = {}
        self.layer: nn.Module | None = None


_of_thread = _OfThread()


class Saved:
    """A tensor that is saved as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """Returns the tensor. Raises RuntimeError where it was changed in place."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that is kept for backward was changed in place: "
                f"it is at version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor


class Recomputed:
    """A view into one output of a recipe."""

    __slots__ = ("recipe", "index", "geometry")

    def __init__(self, recipe: Recipe, index: int, tensor: Tensor):
        self.recipe, self.index = recipe, index
        self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
        recipe.pending += 1

    def get(self) -> Tensor:
        """Returns the view, of outputs that are computed where no other view has had them computed."""
        return self.recipe.take(self.index).as_strided(*self.geometry)


class Recipe:
    """How the tensors that ``fn`` returns are computed.

    reads: the modules whose parameters and settings fn uses. parameters: given to fn after its inputs, as they are now.
    pending: the number of reads of its outputs still to come.
    """

    __slots__ = ("fn", "inputs", "seen", "seeds", "autocast", "pending", "outputs", "__weakref__")

    def __init__(
        self,
        fn: Callable,
        inputs: tuple[Tensor, ...],
        reads: tuple[nn.Module, ...] = (),
        parameters: tuple[Tensor, ...] = (),
    ):
        self.fn, self.inputs = fn, [*map(_pack, inputs), *map(Saved, parameters)]
        self.seen = Seen(reads, _of_thread.layer)
        self.seeds: list[Tensor] = []
        self.autocast = _autocast_state(inputs[0].device.type)
        self.pending = 0
        self.outputs: tuple[Tensor, ...] | None = None

    def take(self, index: int) -> Tensor:
        """Returns output ``index``; the last read drops the outputs."""
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


def recomputed(fn: Callable[..., Outputs], *inputs: Tensor, reads: tuple[nn.Module, ...] = ()) -> Outputs:
    """Returns ``fn(*inputs)``, whose outputs are recomputed where autograd would save them.

    fn: a function of tensors to a tensor or a tuple of tensors, each with a storage of its own. It draws no random
    numbers but the seeds of this package's dropout, and has no other effects. reads: the modules whose parameters,
    adapters and settings it uses; backward raises RuntimeError where they have changed.
    """
    if not torch.is_grad_enabled():
        return fn(*inputs)
    recipe = Recipe(fn, inputs, reads)
    with philox.recording() as recipe.seeds:
        outputs = fn(*inputs)
    each: Any = outputs if isinstance(outputs, tuple) else (outputs,)
    for index, output in enumerate(each):
        _register(output, recipe, index)
    return outputs


def recomputed_if(
    condition: bool, fn: Callable[..., Outputs], *inputs: Tensor, reads: tuple[nn.Module, ...] = ()
) -> Outputs:
    """Returns ``recomputed(fn, *inputs)`` where ``condition`` holds, else ``fn(*inputs)``, whose output is saved."""
    return recomputed(fn, *inputs, reads=reads) if condition else fn(*inputs)


def recomputed_by(fn: Callable, output: Tensor, *inputs: Tensor, parameters: tuple[Tensor, ...] = ()) -> Tensor:
    """Returns ``output``, which ``fn(*inputs, *parameters)`` recomputes, to the bit, where autograd would save it."""
    if torch.is_grad_enabled():
        _register(output, Recipe(fn, inputs, parameters=parameters), 0)
    return output


def _register(output: Tensor, recipe: Recipe, index: int) -> None:
    storage = output.untyped_storage()
    _of_thread.recipes[storage._cdata] = StorageWeakRef(storage), recipe, index


def _pack(tensor: Tensor) -> Saved | Recomputed:
    found = _of_thread.recipes.get(tensor.untyped_storage()._cdata)
    if found is not None and not found[0].expired():
        return Recomputed(found[1], found[2], tensor)
    _observe(tensor)
    return Saved(tensor)


def _observe(tensor: Tensor) -> None:
    for observe in observers:
        observe(tensor)


@contextmanager
def saving(layer: nn.Module | None = None) -> Iterator[None]:
    """Saves the tensors of this block for autograd, or a recipe for each that came out of ``recomputed``.

    layer: the lean layer that runs in the block, whose path errors name.
    """
    if not torch.is_grad_enabled():
        yield
        return
    outer, _of_thread.layer = _of_thread.layer, layer
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, lambda held: held.get()):
            yield
    finally:
        _of_thread.layer = outer


def forget() -> None:
    """Drops this thread's recipes of tensors that are gone. Called when a layer has returned."""
    recipes = _of_thread.recipes
    for address in [address for address, (storage, *_) in recipes.items() if storage.expired()]:
        del recipes[address]


def forget_all() -> None:
    """Drops all of this thread's recipes, with what they hold. Called when a layer has failed."""
    _of_thread.recipes.clear()


def _autocast_state(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


# ---- whole layers ---------------------------------------------------------------------------------------------------


def checkpointed(layer: nn.Module, fn: Callable, x: Tensor, *inputs: Any, offload: bool = False) -> Any:
    """Returns ``fn(x, *inputs)``, of which only the inputs are saved; offload: x in host memory.

    Everything between is recomputed with the same random numbers. fn reads ``layer``; backward raises RuntimeError
    where that has changed.
    """
    for tensor in inputs if offload else (x, *inputs):
        if isinstance(tensor, Tensor):
            _observe(tensor)
    if not torch.compiler.is_compiling():  # a graph binds what it reads
        fn = _Repeated(layer, fn)
    if not offload:
        return checkpoint(fn, x, *inputs, use_reentrant=False)
    held = host_copy(x)
    there = x.new_empty(0)  # a checkpoint keeps the random numbers of the devices that its arguments are on
    output = checkpoint(lambda _, *rest: fn(held.get(), *rest), there, *inputs, use_reentrant=False)
    held.leave()
    return output


class _Repeated:
    """``fn``, which raises RuntimeError from its second run on where ``layer`` has changed since its first.

    What the first run itself changes is no change: a router of NLLB-MoE notes what it has places for.
    """

    def __init__(self, layer: nn.Module, fn: Callable):
        self.layer, self.fn = layer, fn
        self.seen: Seen | None = None

    def __call__(self, *inputs):
        if self.seen is not None:
            self.seen.check()
            return self.fn(*inputs)
        outputs = self.fn(*inputs)
        self.seen = Seen((self.layer,), self.layer, graph=True)
        return outputs
