"""Our own format, for the methods that PEFT has no type for.

A folder with `petl_adapter.json`:
    {"format_version": 1, "method": {"method": "adapter", ...its settings},
     "base_model": {"class": "M2M100ForConditionalGeneration", "parameters": 615073792, "name_or_path": "..."}}
and `petl_adapter.safetensors`, whose keys are "<module path in the Hugging Face model>.<suffix>".
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.interop.store import read_json, read_tensors, write_adapter
from petl_kernels.methods.base import Method
from petl_kernels.methods.registry import from_dict
from petl_kernels.models.structure import total_parameters

CONFIG, WEIGHTS = "petl_adapter.json", "petl_adapter.safetensors"
VERSION = 1


def write(folder: Path, model: nn.Module, config: Method, state: dict[str, Tensor]) -> None:
    """Writes the adapter's two files into `folder`."""
    content = {"format_version": VERSION, "method": config.to_dict(), "base_model": fingerprint(model)}
    write_adapter(folder / CONFIG, content, folder / WEIGHTS, state)


def read(folder: Path, model: nn.Module) -> tuple[Method, dict[str, Tensor]]:
    """Returns (config, state) of the adapter in `folder`. Raises InputError for damaged ones, or of another base."""
    path = folder / CONFIG
    content = read_json(path)
    if content.get("format_version") != VERSION:
        raise InputError(f"{path}: format_version {content.get('format_version')!r}, expected {VERSION}")
    config = _read_config(path, content.get("method"))
    _check_base(path, content.get("base_model"), model)
    return config, read_tensors(folder / WEIGHTS)


def fingerprint(model: nn.Module) -> dict:
    """Returns what tells base models apart: class, number of parameters and, for people, where it came from."""
    name_or_path = getattr(getattr(model, "config", None), "name_or_path", "") or ""
    return {"class": type(model).__name__, "parameters": total_parameters(model), "name_or_path": name_or_path}


def _read_config(path: Path, fields) -> Method:
    if not isinstance(fields, dict):
        raise InputError(f"{path}: method {fields!r}, expected an object with the method's settings")
    try:
        return from_dict(fields)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error


def _check_base(path: Path, base, model: nn.Module) -> None:
    if not isinstance(base, dict):
        raise InputError(f"{path}: base_model {base!r}, expected an object")
    here = fingerprint(model)
    for key, what in (("class", "a"), ("parameters", "a model whose number of parameters is")):
        if base.get(key) != here[key]:
            raise InputError(f"{path}: made for {what} {base.get(key)} ({key}), this model has {here[key]}")
