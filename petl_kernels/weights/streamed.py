"""Frozen layers whose weights are in memory only around their use.

``stream_layers(model)`` takes the frozen weights of a model's layers out of (device) memory. When a layer runs, forward
or backward, its weights are there and those of the next layers are on their way; ``slots`` layers at most hold memory.
Trained parameters, norms, biases, embeddings and the output projection stay where they are: biases and norms are about
a thousandth of a layer's bytes, and other adapters train them.

    CPU     weights are pages of a memory-mapped safetensors file, the checkpoint's own or one that is written once.
            The system reads pages ahead of their use, and they are given back when the layer is done.
    CUDA    weights are in pinned host memory. Copies run on a stream of their own into device slots as large as the
            largest layer; the compute stream waits for a copy by event, and a copy for the last use of its slot.

Order of use: encoder layers, decoder layers, and back. Hooks on the layer run when it starts: a forward pre-hook, and
in backward a pre-hook on the autograd node that made the layer's output. Everything of the layer's graph comes after
that node, and so does what checkpoints and recipes recompute (tiers 1 to 5); all of it runs before the next layer's
node, since autograd takes the last made of the nodes that are ready. PyTorch's module backward hooks would do as well,
but put a node of their own around the layer's inputs and outputs.

The storage of a weight stays one object: autograd keeps weights from forward to backward, some as the parameter itself,
some as views (``F.linear`` keeps Wᵀ), and the hooks of lean layers as detached aliases. Assigning ``.data`` would reach
the first kind only, and the others would read a slot that holds another layer by then. All of them share the weight's
storage, so it is the storage's address that changes (as FSDP resizes storages to nothing and back), behind the version
counters, which therefore still notice changes of the values. On the CPU not even the address changes. Reading a weight
that is out of the device raises an error that names it.

A quantized weight is streamed as the plain tensors that hold it.

``state_dict`` has the weights (on CUDA those in host memory). While a model is streamed it refuses to load a state
dict, to be copied, to be merged on CUDA, and to switch to an adapter that trains streamed weights; ``unstream`` puts
everything back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.extension import extension
from petl_kernels.layers.lean import narrow
from petl_kernels.methods.owner import own, owner
from petl_kernels.models.structure import Layer, describe
from petl_kernels.ops.quantized import parts_of
from petl_kernels.weights.mapped import MappedWeights, Weights, from_files, mapped_weights
from petl_kernels.weights.slots import SlotCopies, Slots


def copies_hide(
    layer_bytes: int, tokens: int, flops_per_token: float, pcie_bytes_per_s: float, flops_per_s: float
) -> bool:
    """Returns whether the copy of a layer takes no longer than the matrix work of the layer before it:

        layer_bytes / pcie_bytes_per_s  <=  tokens · flops_per_token / flops_per_s

    flops_per_token: of the layer's forward pass, 2 for each frozen weight. Backward does as much, for dx alone, or
    more, so the forward pass decides. In bf16 (2 bytes and 2 operations a weight) it comes to
    tokens >= flops_per_s / pcie_bytes_per_s, whatever the layer's size.
    """
    return layer_bytes / pcie_bytes_per_s <= tokens * flops_per_token / flops_per_s


def stream_layers(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    slots: int = 2,
    folder: str | Path | None = None,
    files: Sequence[str | Path] = (),
    device: torch.device | str | None = None,
) -> Streamed:
    """Streams the frozen weights of ``layers`` (paths as in ``describe(model)``; None for all), in place.

    slots: how many layers hold memory at once, at least 2: the one in use and the next.
    folder, files: for the CPU. The weights are read from ``files`` (safetensors, the checkpoint that the model came
    from, in the model's dtype) or else from a file that is written into ``folder``, unless it is there already.
    Where they are on the meta device, the model takes its weights from ``files``, on CUDA too: they are never in
    memory all at once.
    device: where the layers run, when they are not there yet: ``stream_layers(model, device="cuda")``, then
    ``model.to("cuda")`` moves what is left.
    Raises InputError, with the model as it was: fewer than 2 slots, a path that is no layer, a layer without frozen
    weights, a model that is streamed, files that do not have the model's weights, too little pinned memory.
    """
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 2:
        raise InputError(f"slots {slots!r}: expected a whole number of at least 2")
    if owner(model).streamed is not None:
        raise InputError("stream_layers: the model is streamed already, unstream it first")
    chosen = _chosen_layers(model, layers)
    for layer in chosen:
        narrow(model.get_submodule(layer.path))
    weights = [_frozen_weights(model, layer) for layer in chosen]
    home = _device(weights)
    unread = home.type == "meta"
    if unread:
        weights, home = from_files(model, weights, files), torch.device("cpu")
    store = _store(weights, slots, home if device is None else resolve(device), folder, files, unread)
    store.take()
    streamed = Streamed(model, chosen, weights, slots, store)
    streamed.attach()
    return streamed


def unstream(model: nn.Module) -> nn.Module:
    """Puts the weights of a streamed model back into memory; returns the model. Raises InputError for another one."""
    streamed = owner(model).streamed
    if streamed is None:
        raise InputError("unstream: the model is not streamed")
    streamed.unstream()
    return model


class Streamed:
    """A model's streamed layers, in ``model.petl.streamed``. bytes: of them all; layer_bytes: of the largest."""

    def __init__(
        self, model: nn.Module, layers: list[Layer], weights: list[Weights], slots: int, store: MappedWeights | Slots
    ):
        self.slots, self.paths = slots, [layer.path for layer in layers]
        sizes = [sum(tensor.nbytes for tensor in own.values()) for own in weights]
        self.bytes, self.layer_bytes = sum(sizes), max(sizes)
        self._model, self._weights = model, weights
        self._store: MappedWeights | Slots = store
        self._decoder = next((i for i, layer in enumerate(layers) if layer.side == "decoder"), 0)
        self._versions: list[int] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Puts the hooks on the model that bring weights and take them away."""
        self._versions = [tensor._version for tensor in self._tensors()]
        self._handles = [handle for i, path in enumerate(self.paths) for handle in self._hook(i, path)]
        own(self._model).streamed = self

    def resident_bytes(self) -> int:
        """Returns on the CPU the bytes of the files' pages in this process' memory, on CUDA those of the slots."""
        return 0 if self._store is None else self._store.resident_bytes()

    def unstream(self) -> None:
        """Takes the hooks off and puts the weights back."""
        for handle in self._handles:
            handle.remove()
        for tensor, values in self._store.values():
            tensor.data = values
        self._store = None  # pyright: ignore[reportAttributeAccessIssue]  # frees it; the hooks that use it are gone
        own(self._model).streamed = None

    def __reduce_ex__(self, protocol):
        raise InputError("a streamed model: unstream it before it is copied or pickled")

    def _hook(self, i: int, path: str) -> Iterable[torch.utils.hooks.RemovableHandle]:
        layer = self._model.get_submodule(path)
        yield layer.register_forward_pre_hook(partial(self._before_forward, i))
        yield layer.register_forward_hook(partial(self._before_backward, i))
        yield layer.register_state_dict_post_hook(partial(self._saved, i, path))
        yield layer.register_load_state_dict_pre_hook(partial(self._refuse_loading, i, path))

    def _before_forward(self, i: int, layer: nn.Module, args: tuple) -> None:
        # a checkpoint around the layer calls it again in the middle of backward
        self._use(i, backward=torch._C._current_graph_task_id() != -1)

    def _before_backward(self, i: int, layer: nn.Module, args: tuple, output) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda grads: self._use(i, backward=True))

    def _use(self, i: int, backward: bool) -> None:
        self._check_unchanged()
        self._store.use(i, list(islice(self._next(i, backward), self.slots - 1)))

    def _next(self, i: int, backward: bool) -> Iterable[int]:
        """Returns the layers in the order in which they will be needed after layer ``i``, each once."""
        up, down = range(i + 1, len(self.paths)), range(i - 1, -1, -1)
        if backward:
            order = chain(down, up)  # after the first layer comes the next step's forward pass
        elif torch.is_grad_enabled():
            order = chain(up, down)
        else:
            order = chain(up, range(self._decoder, i), range(i))  # generation goes round and round the decoder
        return dict.fromkeys(order)

    def _check_unchanged(self) -> None:
        for tensor, version in zip(self._tensors(), self._versions, strict=True):
            if tensor._version != version:
                name = next(name for own in self._weights for name, other in own.items() if other is tensor)
                raise InputError(f"{name}: changed in place while it is streamed; unstream the model before that")

    def _tensors(self) -> Iterable[Tensor]:
        return (tensor for own in self._weights for tensor in own.values())

    def _saved(self, i: int, path: str, layer: nn.Module, state: dict, prefix: str, metadata) -> None:
        """Gives a state dict the values in host memory for weights that are out of the device."""
        for name, values in self._store.saved(i).items():
            key = prefix + name.removeprefix(f"{path}.")
            if key in state:
                state[key] = values

    def _refuse_loading(self, i: int, path: str, layer: nn.Module, state: dict, prefix: str, *_) -> None:
        for name in self._weights[i]:
            if prefix + name.removeprefix(f"{path}.") in state:
                raise InputError(f"{name}: streamed, so no state dict can be loaded into it; unstream the model first")


# ---- which weights ---------------------------------------------------------------------------------------------------


def _chosen_layers(model: nn.Module, paths: Sequence[str] | None) -> list[Layer]:
    layers = describe(model).layers
    if paths is None:
        return list(layers)
    known = {layer.path for layer in layers}
    for path in paths:
        if path not in known:
            raise InputError(f"layer {path!r}: not one of the model's {len(known)}, such as {layers[0].path!r}")
    if not paths:
        raise InputError("layers []: expected at least one")
    return [layer for layer in layers if layer.path in set(paths)]


def _frozen_weights(model: nn.Module, layer: Layer) -> Weights:
    """Returns the tensors of the layer's frozen linear weights that no other module reads."""
    inside = {f"{path}.weight" for block in (*layer.attentions, layer.ffn) for path in block.linears}
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found: Weights = {}
    for name in sorted(inside):
        parameter = model.get_parameter(name)
        if parameter.requires_grad or holders[id(parameter)] > 1:
            continue
        tensors = parts_of(parameter)
        found.update({name: tensors[0]} if tensors[0] is parameter else _numbered(name, tensors))
    if not found:
        raise InputError(f"layer {layer.path!r}: no frozen weight in it, so there is nothing to stream")
    return found


def _numbered(name: str, tensors: list[Tensor]) -> Weights:
    return {f"{name}.{k}": tensor for k, tensor in enumerate(tensors)}


def _device(weights: list[Weights]) -> torch.device:
    devices = {tensor.device for own in weights for tensor in own.values()}
    if len(devices) > 1:
        raise InputError(
            f"stream_layers: the layers are on {', '.join(sorted(map(str, devices)))}; expected one device"
        )
    return devices.pop()


def _store(
    weights: list[Weights],
    slots: int,
    device: torch.device,
    folder: str | Path | None,
    files: Sequence[str | Path],
    unread: bool,
) -> MappedWeights | Slots:
    """Returns a place for the weights of layers on ``device``. unread: they have no values yet but the files'."""
    if device.type == "cpu":
        return mapped_weights(weights, folder, files, unread)
    if device.type != "cuda" or not hasattr(extension(), "SlotRing"):
        raise InputError(
            f"stream_layers: device {str(device)!r}, expected the CPU, or CUDA and an extension built for it"
        )
    return Slots(weights, slots, device, SlotCopies(device))
