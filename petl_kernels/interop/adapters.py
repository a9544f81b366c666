"""`save_adapter` and `load_adapter`: between adapted models and folders."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_path
from petl_kernels.interop import native_format, peft_format
from petl_kernels.interop.store import read_tensors, write_tensors
from petl_kernels.methods.adapt import adapt
from petl_kernels.methods.base import Method
from petl_kernels.methods.foreign import check_adaptable, check_no_peft, check_unwrapped
from petl_kernels.methods.owner import active_name, find_record, records
from petl_kernels.methods.state import adapter_state, load_adapter_state, load_training_state, training_state

_FORMATS = (peft_format, native_format)
_TRAINING = "petl_training.safetensors"  # what training has in another form than is stored


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Writes the adapter `name` (default: the active one) and returns the folder that holds its two files.

    LoRA, (IA)^3 and LayerNorm tuning are written as Hugging Face PEFT reads them (`adapter_config.json`,
    `adapter_model.safetensors`), the other methods in our own format (`petl_adapter.json`, `petl_adapter.safetensors`).
    As in PEFT, an adapter that is not named "default" goes into a subfolder of its name; beside a saved model "default"
    does, too. The same adapter gives the same bytes; an older adapter in the folder is replaced whole or, on any error,
    left as it was.

    Raises: InputError for an unknown name or a folder that holds an adapter of the other format; OSError that names
    the file when the disk is full.
    """
    check_unwrapped(model)
    name = _pick_name(model, name)
    folder = Path(folder)
    # beside a model, transformers takes adapter files for PEFT's and puts them into the model that it loads
    home = folder if name == "default" and not (folder / "config.json").is_file() else folder / name
    return _write(model, name, home)


def write_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes every adapter of `model` into a subfolder of its name, for ``save_pretrained`` and Trainer's checkpoints.

    These are the files of ``save_adapter``, and what training goes on from where that is another form (prefix-tuning).

    Raises as ``save_adapter`` does.
    """
    for name in records(model):
        home = _write(model, name, Path(folder) / name)
        tensors = training_state(model, name)
        if tensors:
            with atomic_path(home / _TRAINING) as temporary:
                write_tensors(temporary, tensors)
        else:
            (home / _TRAINING).unlink(missing_ok=True)


def _write(model: nn.Module, name: str, home: Path) -> Path:
    check_no_peft(model)
    config = find_record(model, name).config
    writer = peft_format if peft_format.can_write(config) else native_format
    for other in _FORMATS:
        if other is not writer and (home / other.CONFIG).exists():
            raise InputError(f"{home} holds another adapter ({other.CONFIG}): choose another folder or remove it")
    writer.write(home, model, config, adapter_state(model, name))
    return home


def load_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> nn.Module:
    """Puts the adapter of `folder` (PEFT's format or ours) into `model`, makes it the active one, returns the model.

    `folder` is what ``save_adapter``, PEFT, ``model.save_pretrained`` of an adapted model or a Trainer's checkpoint is.

    The modules are created from the files; the model may be plain or have other adapters. `name`: which adapter of the
    folder, and its name in the model; by default that of the only subfolder with an adapter, or "default" for files
    that stand in the folder itself.

    Raises InputError in one line, and leaves the model as it was: no adapter there, damaged or foreign files, a PEFT
    type or setting that is not supported, tensors that are missing, surplus or of the wrong shape, a base model of
    another class or size (our format), a name that the model has already.
    """
    check_adaptable(model)
    home, name = _find(Path(folder), name)
    config, state = _read(model, home)
    _check_fit(model, home, config, name, state)
    adapt(model, config, name)
    load_adapter_state(model, name, state)
    return model


def fill_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Gives the active adapter of ``model`` the values of the one in ``folder``, which has its name; returns the model.

    Raises InputError as ``load_adapter`` does.
    """
    home, name = _find(Path(folder), None)
    load_adapter_state(model, name, _read(model, home)[1])
    return model


def fill_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Gives every adapter of ``model`` the values that ``write_adapters`` has put into ``folder``, bit for bit.

    Raises InputError for an adapter that is not there, or that computes something else there (another alpha, say).
    """
    folder, held = Path(folder), held_adapters(folder)
    for name, record in records(model).items():
        if name not in held:
            there = ", ".join(map(repr, held)) or "none"
            raise InputError(f"{folder} holds no adapter {name!r}, which this model has; there: {there}")
        config, state = _read(model, folder / name)
        _check_same(model, folder / name, record.config, config)
        training = folder / name / _TRAINING
        if training.is_file() and training_state(model, name):
            load_training_state(model, name, read_tensors(training))
        else:
            load_adapter_state(model, name, state)


def held_adapters(folder: str | os.PathLike) -> list[str]:
    """Returns the names of the adapters in subfolders of ``folder``, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and _holds_adapter(child))


def _pick_name(model: nn.Module, name: str | None) -> str:
    if name is not None:
        return name
    active = active_name(model)
    if active is not None:
        return active
    known = list(records(model))
    if len(known) == 1:
        return known[0]
    which = f"name one of {', '.join(known)}" if known else "the model has no adapter"
    raise InputError(f"no adapter is active: {which}")


def _read(model: nn.Module, home: Path) -> tuple[Method, dict[str, torch.Tensor]]:
    reader = next(reader for reader in _FORMATS if (home / reader.CONFIG).is_file())
    return reader.read(home, model)


def _check_same(model: nn.Module, home: Path, here: Method, there: Method) -> None:
    """Raises InputError for an adapter in ``home`` that computes something else with the same tensors."""
    ours, theirs = here.computes(model), there.computes(model)
    for what in {**ours, **theirs}:
        if ours.get(what) != theirs.get(what):
            raise InputError(f"{home}: {what} {theirs.get(what)!r}, and this model's adapter has {ours.get(what)!r}")


def _holds_adapter(folder: Path) -> bool:
    return any((folder / reader.CONFIG).is_file() for reader in _FORMATS)


def _find(folder: Path, name: str | None) -> tuple[Path, str]:
    """Returns (folder with the two files, the adapter's name in the model)."""
    if not folder.is_dir():
        raise InputError(f"adapter folder {str(folder)!r} does not exist")
    if all((folder / reader.CONFIG).is_file() for reader in _FORMATS):
        raise InputError(f"{folder} holds two adapters, {' and '.join(reader.CONFIG for reader in _FORMATS)}")
    if name is not None and _holds_adapter(folder / name):
        return folder / name, name
    if _holds_adapter(folder):
        return folder, name or "default"
    inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and _holds_adapter(child))
    if len(inside) == 1 and name is None:
        return folder / inside[0], inside[0]
    if inside:
        wanted = "say which" if name is None else f"none is named {name!r}"
        raise InputError(f"{folder} holds the adapters {', '.join(inside)}: {wanted}")
    expected = " or ".join(reader.CONFIG for reader in _FORMATS)
    raise InputError(f"{folder} holds no adapter: {expected} was expected")


def _check_fit(model: nn.Module, home: Path, config, name: str, state: dict[str, torch.Tensor]) -> None:
    """Adapts a copy of the model that has shapes but no values, and compares; the model itself stays as it is."""
    shapes = _without_values(model)
    try:
        adapt(shapes, config, name)
        load_adapter_state(shapes, name, {key: tensor.to("meta") for key, tensor in state.items()})
    except InputError as error:
        raise InputError(f"{home}: {error}") from error


def _without_values(model: nn.Module) -> nn.Module:
    """Returns a copy of the model on the meta device; tied parameters stay tied."""
    set_aside = [
        tensor
        for record in records(model).values()
        for kept in (record.base, record.added, record.unmerged or {})
        for tensor in kept.values()
    ]
    memo: dict[int, object] = {}  # what deepcopy takes for each tensor in place of copying it
    for tensor in (*model.parameters(), *model.buffers(), *set_aside):
        empty = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)
