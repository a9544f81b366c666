"""The two files of an adapter, a JSON config and a safetensors file: read strictly, written whole and byte-stable."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_path, atomic_write


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises InputError when it is missing, damaged or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}: an object was expected")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a safetensors file, on the CPU.

    Raises InputError when it is missing, damaged or holds anything but floating-point tensors.
    """
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = f"; {pickled.name} is a pickle, which is not read" if pickled.is_file() else ""
        raise InputError(f"{path} is missing{hint}")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name!r} is {tensor.dtype}, expected a floating-point type")
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file; tensors on any device."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def write_adapter(config_path: Path, config: dict, weights_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes both files, or neither: the same config and tensors give the same bytes.

    Raises: OSError that names the file when the disk is full or the folder cannot be written.
    """
    folder = config_path.parent
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(config_path) as file, atomic_path(weights_path) as temporary:
            # settings are sorted; inside of one the order may mean something: the first pattern that matches counts
            file.write(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
            write_tensors(temporary, tensors)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
