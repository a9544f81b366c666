"""Frozen layers whose weights are in memory only around their use.

``stream_layers(model)`` takes the frozen weights of a model's layers out of (device) memory. When a layer runs, forward
or backward, its weights are there and those of the next layers are on their way; ``slots`` layers at most hold memory.
Trained parameters, norms, biases, embeddings and the output projection stay where they are: biases and norms are about
a thousandth of a layer's bytes, and what other adapters train.

    CPU     weights are pages of a memory-mapped safetensors file, the checkpoint's own or one that is written once.
            Pages come when they are read (asked for ahead), and are given back when the layer is done.
    CUDA    weights are in pinned host memory. Copies run on a stream of their own into device slots as large as the
            largest layer; the compute stream waits for a copy by event, and a copy for the last use of its slot.

Order of use: encoder layers, decoder layers, and back. Hooks on the layer tell when it starts: a forward pre-hook, and
in backward a pre-hook on the autograd node that made the layer's output. Everything of the layer's graph comes after
that node, what checkpoints and recipes compute again too (tiers 1 to 5), and all of it runs before the next layer's
node: of the nodes that are ready, autograd takes the last made first. PyTorch's module backward hooks would do as well,
but put a node of their own around the layer's inputs and outputs.

Why the storage of a weight stays one object: autograd keeps weights from forward to backward, some as the parameter
itself, some as views (``F.linear`` keeps Wᵀ), and the hooks of lean layers as detached aliases. Assigning ``.data``
would reach the first kind only, and the others would read a slot that holds another layer by then. All of them share
the weight's storage, so it is the storage's address that changes (as FSDP resizes storages to nothing and back), behind
the version counters, which therefore still notice changes of the values. On the CPU not even the address changes.
Reading a weight that is out of the device raises an error that names it.

A weight may be quantised, a parameter that holds several plain tensors: ``plain_tensors``.

``state_dict`` has the weights (on CUDA: those in host memory). Not while streamed: loading a state dict, deep copies,
merging on CUDA, switching to an adapter that trains streamed weights; ``unstream`` puts everything back.

Bounds on the CPU, while the model runs: ``slots`` layers, and a large page of the file's cache (2 MiB) at either end of
each unbroken range, since the system maps the whole one around a byte that is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.interop.files import atomic_path
from petl_kernels.memory.size import format_size
from petl_kernels.methods.base import set_parameter
from petl_kernels.methods.structure import Layer, describe

FILE = "frozen_layers.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 256  # of tensors in a slot, as CUDA's own allocations have
_PAGE = 4096

Weights = dict[str, Tensor]  # the tensors of one layer by name


def copies_hide(
    layer_bytes: int, tokens: int, flops_per_token: float, pcie_bytes_per_s: float, flops_per_s: float
) -> bool:
    """Whether the copy of a layer takes no longer than the matrix work of the layer before it:

        layer_bytes / pcie_bytes_per_s  <=  tokens · flops_per_token / flops_per_s

    flops_per_token: of the layer's forward pass, 2 for each frozen weight. Backward does as much, for dx alone, or
    more, so the forward pass decides. In bf16 (2 bytes and 2 operations a weight) it comes to
    tokens >= flops_per_s / pcie_bytes_per_s, whatever the layer's size.
    """
    return layer_bytes / pcie_bytes_per_s <= tokens * flops_per_token / flops_per_s


def plain_tensors(parameter: Tensor) -> list[Tensor]:
    """The tensors that hold the values of ``parameter``: itself, or what its ``parts()`` returns."""
    parts = getattr(parameter, "parts", None)
    return [parameter] if parts is None else list(parts())


def stream_layers(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    slots: int = 2,
    folder: str | Path | None = None,
    files: Sequence[str | Path] = (),
    device: torch.device | str | None = None,
) -> Streamed:
    """Stream the frozen weights of ``layers`` (paths as in ``describe(model)``; None for all), in place.

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
    if getattr(model, "petl_streamed", None) is not None:
        raise InputError("stream_layers: the model is streamed already, unstream it first")
    chosen = _chosen_layers(model, layers)
    weights = [_frozen_weights(model, layer) for layer in chosen]
    home = _device(weights)
    unread = home.type == "meta"
    if unread:
        weights, home = _from_files(model, weights, files), torch.device("cpu")
    store = _store(weights, slots, home if device is None else torch.device(device), folder, files, unread)
    return Streamed(model, chosen, weights, slots, store)


def unstream(model: nn.Module) -> nn.Module:
    """Put the weights of a streamed model back into memory; returns the model."""
    streamed = getattr(model, "petl_streamed", None)
    if streamed is None:
        raise InputError("unstream: the model is not streamed")
    streamed.unstream()
    return model


class Streamed:
    """A model's streamed layers, in ``model.petl_streamed``; ``layer_bytes`` is the largest one's."""

    def __init__(
        self, model: nn.Module, layers: list[Layer], weights: list[Weights], slots: int, store: _Mapped | _Slots
    ):
        self.slots, self.paths = slots, [layer.path for layer in layers]
        sizes = [sum(tensor.nbytes for tensor in own.values()) for own in weights]
        self.bytes, self.layer_bytes = sum(sizes), max(sizes)
        self._model, self._weights, self._store = model, weights, store
        self._versions = [tensor._version for tensor in self._tensors()]
        self._decoder = next((i for i, layer in enumerate(layers) if layer.side == "decoder"), 0)
        self._handles = [handle for i, path in enumerate(self.paths) for handle in self._hook(i, path)]
        model.petl_streamed = self

    def resident_bytes(self) -> int:
        """CPU: bytes of the files' pages that are in this process' memory now. CUDA: bytes of the slots."""
        return 0 if self._store is None else self._store.resident_bytes()

    def unstream(self) -> None:
        for handle in self._handles:
            handle.remove()
        for tensor, values in self._store.values():
            tensor.data = values
        self._store = None
        del self._model.petl_streamed

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
        """The layers in the order in which they will be needed after layer ``i``, each once."""
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
        """What a state dict has for weights that are out of the device: those in host memory."""
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
    """The layer's frozen linear weights that no module outside of the layer reads."""
    inside = {f"{path}.weight" for block in (*layer.attentions, layer.ffn) for path in block.linears}
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found: Weights = {}
    for name in sorted(inside):
        parameter = model.get_parameter(name)
        if parameter.requires_grad or holders[id(parameter)] > 1:
            continue
        tensors = plain_tensors(parameter)
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


def _from_files(model: nn.Module, weights: list[Weights], files: Sequence[str | Path]) -> list[Weights]:
    """Parameters in the place of those on the meta device, with the values in ``files``."""
    if not files or any(type(tensor) is not nn.Parameter for own in weights for tensor in own.values()):
        raise InputError(
            "stream_layers: the weights are on the meta device; expected the checkpoint's files, or load it"
        )
    places = _find_in(files, weights)
    mapped = _map(places)
    found = []
    for own in weights:
        views = {name: _view(mapped, places[name], tensor) for name, tensor in own.items()}
        found.append({name: nn.Parameter(view, requires_grad=False) for name, view in views.items()})
        for name, parameter in found[-1].items():
            set_parameter(model, name, parameter)
    return found


def _store(
    weights: list[Weights],
    slots: int,
    device: torch.device,
    folder: str | Path | None,
    files: Sequence[str | Path],
    unread: bool,
) -> _Mapped | _Slots:
    """``unread``: the weights are the files' own, with nothing in memory yet."""
    extension = _extension()
    if device.type == "cpu":
        return _Mapped(weights, folder, files, unread)
    if device.type != "cuda" or not hasattr(extension, "SlotRing"):
        raise InputError(
            f"stream_layers: device {str(device)!r}, expected the CPU, or CUDA and an extension built for it"
        )
    return _Slots(weights, slots, device, CudaCopies(device))


def _extension():
    try:
        import petl_kernels._C as extension
    except ImportError:
        raise InputError("stream_layers: the C++ extension was not built; reinstall with a C++ compiler") from None
    return extension


# ---- CPU: pages of a file --------------------------------------------------------------------------------------------


class _Mapped:
    """Weights in memory-mapped files."""

    def __init__(self, weights: list[Weights], folder: str | Path | None, files: Sequence[str | Path], unread: bool):
        places = _find_in(files, weights) if files else _find_in([_written(folder, weights)], weights)
        self._files = _map(places)
        self._spans = [_spans(places[name] for name in own) for own in weights]  # of each layer: (path, first, last)
        views = {}
        for i, own in enumerate(weights):
            for name, tensor in own.items():
                views[name] = _view(self._files, places[name], tensor)
                if not unread and not _same(views[name], tensor):
                    raise InputError(f"{places[name][0]}: tensor {name!r} has other values than the model's")
            self.use(i, [])
        for own in weights:
            for name, tensor in own.items():
                tensor.data = views[name]
        self._weights = weights

    def use(self, i: int, ahead: list[int]) -> None:
        """Give back the pages of all layers but these, and ask for those of ``ahead``."""
        for path, file in self._files.items():
            first = 0
            kept = sorted(span[1:] for layer in (i, *ahead) for span in self._spans[layer] if span[0] == path)
            for start, end in (*kept, (file.size(), file.size())):
                file.drop(first, start - first)
                first = end
        for layer in ahead:
            for path, start, end in self._spans[layer]:
                self._files[path].will_need(start, end - start)

    def resident_bytes(self) -> int:
        return sum(file.resident(0, file.size()) for file in self._files.values())

    def saved(self, i: int) -> Weights:
        return {}  # the model's own tensors have their values

    def values(self) -> Iterable[tuple[Tensor, Tensor]]:
        for i, own in enumerate(self._weights):
            for tensor in own.values():
                yield tensor, tensor.detach().clone()
            self.use(i, [])


def _map(places: dict[str, tuple[Path, int, int]]) -> dict[Path, object]:
    return {path: _extension().MappedFile(str(path)) for path in {path for path, *_ in places.values()}}


def _view(files: dict[Path, object], place: tuple[Path, int, int], like: Tensor) -> Tensor:
    path, start, end = place
    return files[path].tensor(start, end - start).view(like.dtype).view(like.shape)


def _same(one: Tensor, other: Tensor) -> bool:
    """The same bytes."""
    return torch.equal(_raw(one), _raw(other).to(one.device))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _spans(places: Iterable[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Unbroken ranges of bytes."""
    spans: list[tuple[Path, int, int]] = []
    for path, start, end in sorted(places):
        if spans and spans[-1][0] == path and spans[-1][2] == start:
            start = spans.pop()[1]
        spans.append((path, start, end))
    return spans


def _find_in(files: Sequence[str | Path], weights: list[Weights]) -> dict[str, tuple[Path, int, int]]:
    """Name -> (file, first byte, end) of every tensor; InputError for one that is not there as the model has it."""
    headers = {Path(path): _read_header(Path(path)) for path in files}
    found = {}
    for name, tensor in ((name, tensor) for own in weights for name, tensor in own.items()):
        path = next((path for path, header in headers.items() if name in header), None)
        if path is None:
            raise InputError(f"{', '.join(map(str, headers))}: tensor {name!r} is not there, so it is another model's")
        dtype, shape, start, end = headers[path][name]
        if (_DTYPES.get(dtype), shape) != (tensor.dtype, tuple(tensor.shape)):
            expected = f"{_NAMES.get(tensor.dtype, tensor.dtype)} {tuple(tensor.shape)}"
            raise InputError(f"{path}: tensor {name!r} is {dtype} {shape}, expected {expected} as the model has it")
        if start % tensor.element_size():
            raise InputError(
                f"{path}: tensor {name!r} starts at byte {start}, expected a multiple of its element's size"
            )
        found[name] = path, start, end
    return found


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name -> (dtype, shape, first byte, end) of a safetensors file; InputError when it is none."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= size - 8 else None
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            shape = tuple(entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
            if end > size or (dtype is not None and math.prod(shape) * dtype.itemsize != end - start):
                raise ValueError
            found[name] = entry["dtype"], shape, start, end
        return found
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged or no safetensors file") from None


def _written(folder: str | Path | None, weights: list[Weights]) -> Path:
    """The file in ``folder`` that has these weights: written now, unless it is there."""
    if folder is None:
        raise InputError(
            "stream_layers: expected the checkpoint's safetensors files, or a folder for a file of weights"
        )
    path = Path(folder, FILE)
    if not _has(path, weights):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, weights)
    return path


def _has(path: Path, weights: list[Weights]) -> bool:
    if not path.exists():
        return False
    try:
        places = _find_in([path], weights)
    except InputError:
        return False
    file = _extension().MappedFile(str(path))
    for own in weights:
        for name, tensor in own.items():
            _, start, end = places[name]
            if not _same(file.tensor(start, end - start), tensor):
                return False
        file.drop(0, file.size())
    return True


def _write(path: Path, weights: list[Weights]) -> None:
    """A safetensors file whose data start at a page; one tensor is copied at a time."""
    ordered = _by_alignment(weights)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(ordered)[0])
        for _, tensor in ordered:
            file.write(_raw(tensor).cpu().numpy())


def _header(ordered: list[tuple[str, Tensor]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file with these tensors, up to a page, and where each one's data start."""
    header, starts, end = {}, {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // _PAGE) * _PAGE - 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in starts.items()}


class WeightFile:
    """A safetensors file that takes the weights of a model one after the other, and gives them back as its pages.

    weights: name -> a tensor of the shape and dtype that it will have, on the meta device, say.
    """

    def __init__(self, path: Path, weights: Weights):
        self.path, self._weights = path, weights
        ordered = _by_alignment([weights])
        header, self._starts = _header(ordered)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.nbytes for _, tensor in ordered))
        self._mapped = _extension().MappedFile(str(path))

    def put(self, name: str, values: Tensor) -> Tensor:
        """Write ``values`` and return them as they stand in the file."""
        like, start = self._weights[name], self._starts[name]
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(_raw(values.to(like.dtype)).numpy())
        return _view({self.path: self._mapped}, (self.path, start, start + like.nbytes), like)


def _by_alignment(weights: list[Weights]) -> list[tuple[str, Tensor]]:
    """Larger elements first, so that each tensor is aligned; among equals, layer after layer."""
    named = [item for own in weights for item in own.items()]
    return sorted(named, key=lambda item: -item[1].element_size())


# ---- CUDA: slots on the device ---------------------------------------------------------------------------------------


class CudaCopies:
    """Pinned memory, and the copies from it into slots."""

    def __init__(self, device: torch.device):
        self._device, self._ring = device, None

    def pinned(self, size: int) -> Tensor:
        return _extension().pinned(size)

    def open(self, slots: list[int]) -> None:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        self._ring = _extension().SlotRing(slots, index)

    def fill(self, slot: int, pieces: list[tuple[int, int, int]]) -> None:
        self._ring.fill(slot, pieces)

    def acquire(self, slot: int) -> None:
        self._ring.acquire(slot, self._stream())

    def release(self, slot: int) -> None:
        self._ring.release(slot, self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream


class _Slots:
    """Weights in pinned host memory, with slots on the device."""

    def __init__(self, weights: list[Weights], slots: int, device: torch.device, copies: CudaCopies):
        self._weights, self._copies, self._device = weights, copies, device
        self._host: list[Weights] = []
        self._move_out()
        self._offsets = [_offsets(own.values()) for own in weights]
        size = max(offsets[-1] for offsets in self._offsets)
        self._memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        copies.open([memory.data_ptr() for memory in self._memory])
        for slot in range(slots):
            copies.release(slot)  # what had this memory before may still be at work
        self._layer_in: list[int | None] = [None] * slots

    def use(self, i: int, ahead: list[int]) -> None:
        """Layer ``i`` can be read by what the current stream gets from now on; ``ahead`` are on their way."""
        needed = (i, *ahead)
        for layer in needed:
            if layer not in self._layer_in:
                self._bring(layer, next(s for s, held in enumerate(self._layer_in) if held not in needed))
        self._copies.acquire(self._layer_in.index(i))

    def resident_bytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory)

    def saved(self, i: int) -> Weights:
        return self._host[i]

    def values(self) -> Iterable[tuple[Tensor, Tensor]]:
        for own, host in zip(self._weights, self._host, strict=True):
            for name, tensor in own.items():
                yield tensor, host[name].to(self._device, copy=True)

    def _move_out(self) -> None:
        """Layer after layer, so that host memory never holds the weights twice."""
        before = _device(self._weights)
        try:
            for i, own in enumerate(self._weights):
                self._host.append({name: self._pinned_copy(tensor) for name, tensor in own.items()})
                for tensor in own.values():
                    tensor.data = torch.empty_like(tensor, device=self._device)
                self._take_away(i)
        except RuntimeError as error:
            for own, host in zip(self._weights, self._host, strict=False):
                for name, tensor in own.items():
                    tensor.data = host[name].to(before, copy=True)
            size = sum(tensor.nbytes for own in self._weights for tensor in own.values())
            raise InputError(
                f"stream_layers: {format_size(size)} of pinned host memory cannot be had ({error}); "
                "expected a host with that much free, or fewer layers"
            ) from None

    def _pinned_copy(self, tensor: Tensor) -> Tensor:
        return self._copies.pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def _bring(self, layer: int, slot: int) -> None:
        before = self._layer_in[slot]
        if before is not None:
            self._take_away(before)
            self._copies.release(slot)
        base, offsets = self._memory[slot].data_ptr(), self._offsets[layer]
        pieces = []
        for (name, tensor), offset in zip(self._weights[layer].items(), offsets, strict=False):
            _extension().place(tensor, base + offset)
            host = self._host[layer][name]
            pieces.append((host.data_ptr(), offset, host.nbytes))
        self._copies.fill(slot, pieces)
        self._layer_in[slot] = layer

    def _take_away(self, layer: int) -> None:
        for name, tensor in self._weights[layer].items():
            _extension().take_away(tensor, f"{name}: streamed, and read outside of its layer; unstream the model first")


def _offsets(tensors: Iterable[Tensor]) -> list[int]:
    """Where each tensor starts in a slot, and where the last one ends."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
