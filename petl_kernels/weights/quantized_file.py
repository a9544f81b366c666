"""A safetensors file of a checkpoint that was quantized once: dense tensors, and the parts of quantized ones.

A quantized weight ``name`` stands there as the plain tensors ``name.packed``, ``name.scale`` and so on, under the names
of ``ops/quantized/storage.py``. The file's metadata has its storage, shape and dtype, which the parts do not tell. The
file has another name than those that transformers looks for, so that transformers finds no weights in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.ops.quantized import QuantizedTensor
from petl_kernels.ops.quantized.storage import PARTS, part_shapes
from petl_kernels.weights.mapped import DTYPES, WeightFile

FILE = "petl_quantized.safetensors"
MARKER = "petl_quantized"  # the key of config.json and of the file's metadata
VERSION = 1


class Stored(NamedTuple):
    """A tensor of a checkpoint's files. dtype: None for one that no weight has.

    read: returns it, as pages of the file that are given back with the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    storage: str = "dense"


class QuantizedFile:
    """A file that takes the tensors of a checkpoint one after the other, so that one at a time is in memory."""

    def __init__(self, path: Path, like: dict[str, Tensor], storages: dict[str, str]) -> None:
        """Makes the file, with room for tensors of the shapes and dtypes of ``like``, which may be meta tensors.

        storages: name -> "int8" or "nf4" of those that are to be quantized.
        """
        self._storages = storages
        about = {
            name: {"storage": storage, "shape": list(like[name].shape), "dtype": _name(like[name].dtype)}
            for name, storage in storages.items()
        }
        flat = {key: tensor for name in like for key, tensor in _plain(name, like[name], storages.get(name)).items()}
        described = json.dumps({"version": VERSION, "weights": about})
        self._file = WeightFile.create(path, flat, {"format": "pt", MARKER: described})

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, which is a ``QuantizedTensor`` where it is to be quantized."""
        if not isinstance(tensor, QuantizedTensor):
            self._file.put(name, tensor)
            return
        for part, values in zip(PARTS[self._storages[name]], tensor.parts(), strict=True):
            self._file.put(f"{name}.{part}", values)


def _plain(name: str, like: Tensor, storage: str | None) -> dict[str, Tensor]:
    """Returns the plain tensors that stand for ``name``, without values."""
    if storage is None:
        return {name: torch.empty_like(like, device="meta")}
    shapes = part_shapes(tuple(like.shape), storage)
    parts = zip(PARTS[storage], shapes, strict=True)
    return {f"{name}.{part}": torch.empty(shape, dtype=dtype, device="meta") for part, (shape, dtype) in parts}


def quantized_bytes(like: dict[str, Tensor], storages: dict[str, str]) -> int:
    """Returns the bytes of the tensors in the file that ``QuantizedFile`` makes of the same arguments."""
    return sum(part.nbytes for name in like for part in _plain(name, like[name], storages.get(name)).values())


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file by name, those of ``QuantizedFile`` as quantized; reads no values.

    Raises InputError for a file that another version of this package has written.
    """
    with safetensors.safe_open(path, framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
        metadata = opened.metadata() or {}
        found = {
            key: Stored(torch.Size(each.get_shape()), DTYPES.get(each.get_dtype()), partial(_read, path, key))
            for key, each in slices.items()
        }
    for name, about in _described(path, metadata.get(MARKER)).items():
        for part in PARTS[about["storage"]]:
            del found[f"{name}.{part}"]
        read = partial(_read_quantized, path, name, about)
        found[name] = Stored(torch.Size(about["shape"]), getattr(torch, about["dtype"]), read, about["storage"])
    return found


def _described(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    about = json.loads(text)
    if about["version"] != VERSION:
        raise InputError(f"{path}: of version {about['version']}; expected version {VERSION}, written anew")
    return about["weights"]


def _read(path: Path, key: str) -> Tensor:
    """Reads one tensor. The file is mapped for this tensor alone, so that no other one's pages stay in memory."""
    with safetensors.safe_open(path, framework="pt") as opened:
        return opened.get_tensor(key)


def _read_quantized(path: Path, name: str, about: dict[str, Any]) -> QuantizedTensor:
    parts = [_read(path, f"{name}.{part}") for part in PARTS[about["storage"]]]
    return QuantizedTensor(parts, about["shape"], getattr(torch, about["dtype"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
