"""Weights that are pages of memory-mapped safetensors files: finding them in files, and writing such a file.

The system reads pages when they are touched, or ahead when it is told, and they are given back when the layer is done.
While a model runs ``slots`` layers hold memory, and a large page of the file's cache (2 MiB) at either end of each
unbroken range, since the system maps the whole one around a byte that is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.extension import extension
from petl_kernels.files import atomic_path
from petl_kernels.models.structure import set_parameter

FILE = "frozen_layers.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096

Weights = dict[str, Tensor]  # the tensors of one layer by name


Place = tuple[Path, int, int]  # where a tensor lies: file, first byte, end


class MappedFile(Protocol):
    """A file of the extension's: its bytes as pages of memory."""

    def size(self) -> int: ...
    def tensor(self, offset: int, size: int) -> Tensor: ...
    def will_need(self, offset: int, size: int) -> None: ...
    def drop(self, offset: int, size: int) -> None: ...
    def resident(self, offset: int, size: int) -> int: ...


def mapped_weights(
    weights: list[Weights], folder: str | Path | None, files: Sequence[str | Path], unread: bool
) -> MappedWeights:
    """Returns ``weights``, those of each layer, mapped from ``files``, or from a file in ``folder``.

    The file is written unless it is there already. unread: the weights have no values yet but those of ``files``.
    Raises InputError where the files do not have such tensors, or neither is given.
    """
    places = _find_in(files or [_written(folder, weights)], weights)
    return MappedWeights(weights, places, unread)


class MappedWeights:
    """The weights of some layers, mapped from the ``places`` of their values in files."""

    def __init__(self, weights: list[Weights], places: dict[str, Place], unread: bool):
        self._weights, self._places, self._unread = weights, places, unread
        self._files = _map(places)
        self._spans = [_spans(places[name] for name in own) for own in weights]  # of each layer

    def take(self) -> None:
        """Lets the model's tensors be the pages of the files, so that what they held is freed.

        Raises InputError, with the tensors as they were, where the files hold other values.
        """
        views = {}
        for i, own in enumerate(self._weights):
            for name, tensor in own.items():
                views[name] = _view(self._files, self._places[name], tensor)
                if not self._unread and not _same(views[name], tensor):
                    raise InputError(f"{self._places[name][0]}: tensor {name!r} has other values than the model's")
            self.use(i, [])
        for own in self._weights:
            for name, tensor in own.items():
                tensor.data = views[name]

    def use(self, i: int, ahead: list[int]) -> None:
        """Gives back the pages of all layers but ``i`` and ``ahead``, and lets the system read those of ``ahead``."""
        for path, file in self._files.items():
            first = 0
            needed = sorted(span[1:] for layer in (i, *ahead) for span in self._spans[layer] if span[0] == path)
            for start, end in (*needed, (file.size(), file.size())):
                file.drop(first, start - first)
                first = end
        for layer in ahead:
            for path, start, end in self._spans[layer]:
                self._files[path].will_need(start, end - start)

    def resident_bytes(self) -> int:
        """Returns the bytes of the files' pages that are in this process' memory."""
        return sum(file.resident(0, file.size()) for file in self._files.values())

    def saved(self, i: int) -> Weights:
        """Returns the values of layer ``i`` that its tensors do not have: none."""
        return {}

    def values(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yields (tensor, a copy of its values in memory), one layer after the other."""
        for i, own in enumerate(self._weights):
            for tensor in own.values():
                yield tensor, tensor.detach().clone()
            self.use(i, [])


def from_files(model: nn.Module, weights: list[Weights], files: Sequence[str | Path]) -> list[Weights]:
    """Puts parameters with the values in ``files`` in the place of those on the meta device; returns them.

    Raises InputError without files, or where a weight is quantized.
    """
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


def _map(places: dict[str, Place]) -> dict[Path, MappedFile]:
    return {path: extension().MappedFile(str(path)) for path in {path for path, *_ in places.values()}}


def _view(files: dict[Path, MappedFile], place: Place, like: Tensor) -> Tensor:
    path, start, end = place
    return files[path].tensor(start, end - start).view(like.dtype).view(like.shape)


def _same(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors hold the same bytes."""
    return torch.equal(_raw(one), _raw(other).to(one.device))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _spans(places: Iterable[Place]) -> list[Place]:
    """Returns ``places`` with neighbours joined into unbroken ranges."""
    spans: list[Place] = []
    for path, start, end in sorted(places):
        if spans and spans[-1][0] == path and spans[-1][2] == start:
            start = spans.pop()[1]
        spans.append((path, start, end))
    return spans


def _find_in(files: Sequence[str | Path], weights: list[Weights]) -> dict[str, Place]:
    """Returns name -> place of every tensor. Raises InputError for one that is not there as the model has it."""
    headers = {Path(path): _read_header(Path(path)) for path in files}
    found = {}
    for name, tensor in ((name, tensor) for own in weights for name, tensor in own.items()):
        path = next((path for path, header in headers.items() if name in header), None)
        if path is None:
            raise InputError(f"{', '.join(map(str, headers))}: tensor {name!r} is not there, so it is another model's")
        dtype, shape, start, end = headers[path][name]
        if (DTYPES.get(dtype), shape) != (tensor.dtype, tuple(tensor.shape)):
            expected = f"{_NAMES.get(tensor.dtype, tensor.dtype)} {tuple(tensor.shape)}"
            raise InputError(f"{path}: tensor {name!r} is {dtype} {shape}, expected {expected} as the model has it")
        if start % tensor.element_size():
            raise InputError(
                f"{path}: tensor {name!r} starts at byte {start}, expected a multiple of its element's size"
            )
        found[name] = path, start, end
    return found


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Returns name -> (dtype, shape, first byte, end) of a safetensors file. Raises InputError when it is none."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Any = json.loads(file.read(length)) if length <= size - 8 else None
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            shape = tuple(entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            if end > size or (dtype is not None and math.prod(shape) * dtype.itemsize != end - start):
                raise ValueError
            found[name] = entry["dtype"], shape, start, end
        return found
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged or no safetensors file") from None


def _written(folder: str | Path | None, weights: list[Weights]) -> Path:
    """Returns the file in ``folder`` that has these weights; writes it unless it is there."""
    if folder is None:
        raise InputError(
            "stream_layers: expected the checkpoint's safetensors files, or a folder for a file of weights"
        )
    path = Path(folder, FILE)
    if not path.exists() or not _compare(path, weights):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, weights)
    return path


def _compare(path: Path, weights: list[Weights]) -> bool:
    """Reads a file, one layer in memory at a time, and returns whether it has these weights with their values."""
    try:
        places = _find_in([path], weights)
    except InputError:
        return False
    files = _map(places)
    for own in weights:
        if not all(_same(_view(files, places[name], tensor), tensor) for name, tensor in own.items()):
            return False
        for file in files.values():
            file.drop(0, file.size())
    return True


def _write(path: Path, weights: list[Weights]) -> None:
    """Writes a safetensors file whose data start at a page; one tensor is copied at a time."""
    ordered = _by_alignment(weights)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(ordered)[0])
        for _, tensor in ordered:
            file.write(_raw(tensor).cpu().numpy().data)


def _header(ordered: list[tuple[str, Tensor]], metadata: dict[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Returns the first bytes of a safetensors file, up to a page, and where each tensor's data start."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    starts, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // _PAGE) * _PAGE - 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in starts.items()}


class WeightFile:
    """A safetensors file that takes the weights of a model one after the other, and gives them back as its pages."""

    def __init__(self, path: Path, weights: Weights, starts: dict[str, int]):
        self.path, self._weights, self._starts = path, weights, starts
        self._mapped = extension().MappedFile(str(path))

    @classmethod
    def create(cls, path: Path, weights: Weights, metadata: dict[str, str] | None = None) -> WeightFile:
        """Makes the file, with room for tensors of the shapes and dtypes of ``weights``, which may be meta tensors."""
        ordered = _by_alignment([weights])
        header, starts = _header(ordered, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.nbytes for _, tensor in ordered))
        return cls(path, weights, starts)

    def put(self, name: str, values: Tensor) -> Tensor:
        """Writes ``values`` and returns them as they stand in the file."""
        like, start = self._weights[name], self._starts[name]
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(_raw(values.to(like.dtype)).numpy().data)
        return _view({self.path: self._mapped}, (self.path, start, start + like.nbytes), like)


def _by_alignment(weights: list[Weights]) -> list[tuple[str, Tensor]]:
    """Returns all tensors, larger elements first, so that each is aligned; among equals, layer after layer."""
    named = [item for own in weights for item in own.items()]
    return sorted(named, key=lambda item: -item[1].element_size())
