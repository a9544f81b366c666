"""A checkpoint quantized once, and kept: the folder that every later run begins with, instead of rounding again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir
from petl_kernels.interop.hf import checkpoint_dtypes, is_quantized, load_config, load_skeleton, load_weights
from petl_kernels.interop.plain import check_free
from petl_kernels.methods.owner import owner
from petl_kernels.ops.quantized import STORAGES, quantize
from petl_kernels.weights.quantized import quantizable, storage_of
from petl_kernels.weights.quantized_file import FILE, MARKER, VERSION, QuantizedFile, quantized_bytes


def quantize_checkpoint(
    path_or_id: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    storage: str,
    tables: str | None = None,
    check: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes the checkpoint into ``folder`` with its matrices in ``storage``, "int8" or "nf4"; returns the folder.

    tables: the storage of token embeddings and of the output projection, where it is another; "dense" leaves them.
    check: is called with the bytes that will be written, before any is. Tensors are read, quantized and written one
    after the other. ``load_pretrained``, ``load_skeleton`` and the trainer read the folder as the model that quantizing
    when it is loaded gives, bit for bit; transformers finds no weights in it.

    Raises InputError as ``load_pretrained`` does, and for a folder that is not empty, another storage, a checkpoint
    that is quantized already; OSError that names the folder when the disk is full.
    """
    check_free(folder)
    _check(path_or_id, storage, tables)
    model, tokenizer = load_skeleton(path_or_id)
    model.requires_grad_(False)
    storages = _storages(model, storage, tables)
    like = _like(path_or_id, model)
    check(quantized_bytes(like, storages))
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(folder) as temporary:
        _write_weights(path_or_id, model, QuantizedFile(temporary / FILE, like, storages), storages)
        _write_config(path_or_id, temporary, storage, tables or storage)
        tokenizer.save_pretrained(temporary)
    return folder


def _check(path_or_id: str | os.PathLike[str], storage: str, tables: str | None) -> None:
    for name, value, known in (("storage", storage, STORAGES), ("tables", tables, (None, "dense", *STORAGES))):
        if value not in known:
            shown = " or ".join(each for each in known if each)
            raise InputError(f"quantize_checkpoint: {name} is {value!r}: expected {shown}")
    if is_quantized(path_or_id):
        raise InputError(f"model {os.fspath(path_or_id)!r}: is quantized already; expected a checkpoint that is not")


def _storages(model: nn.Module, storage: str, tables: str | None) -> dict[str, str]:
    """Returns name -> storage of each weight that is quantized, under the first of its names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    for owners in quantizable(model):
        kind = storage_of(model, owners, storage, tables)
        if kind != "dense":
            weight: Any = owners[0].weight
            found[names[id(weight)]] = kind
    return found


def _like(path_or_id: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """Returns what the file holds, without values: each tensor that the checkpoint has, in the checkpoint's dtype."""
    sources, dtypes = owner(model).sources or {}, checkpoint_dtypes(path_or_id)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        source = sources.get(name)
        if isinstance(source, str):  # transformers makes the others
            found[name] = tensor.detach().to(device="meta", dtype=dtypes[source])
    return found


def _write_weights(
    path_or_id: str | os.PathLike[str], model: nn.Module, file: QuantizedFile, storages: dict[str, str]
) -> None:
    sources = owner(model).sources or {}

    def place(name: str, tensor: Tensor) -> Tensor:
        if isinstance(sources[name], str):
            file.put(name, quantize(tensor, storages[name]) if name in storages else tensor)
        return tensor.new_empty(tensor.shape, device="meta")

    load_weights(path_or_id, model, place)
    for name, buffer in model.named_buffers():
        if isinstance(sources.get(name), str):
            file.put(name, buffer)


def _write_config(path_or_id: str | os.PathLike[str], folder: Path, storage: str, tables: str) -> None:
    """Writes the config with a marker, and copies what the checkpoint says of generation."""
    from transformers.utils.hub import cached_file

    load_config(path_or_id).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("transformers_weights", None)  # a name of files that are not here
    config[MARKER] = {"version": VERSION, "storage": storage, "tables": tables}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = cached_file(
        os.fspath(path_or_id), "generation_config.json", _raise_exceptions_for_missing_entries=False
    )
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
