"""`save_adapter`, `load_adapter`, `save_merged`: between adapted models and folders."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from petl_kernels.api import adapt, merge, unmerge, use_adapter
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir, atomic_path
from petl_kernels.integrations.models import saved_as_it_is
from petl_kernels.interop import native_format, peft_format
from petl_kernels.interop.store import read_tensors, write_tensors
from petl_kernels.methods.base import (
    Method,
    active_name,
    adapter_parameters,
    adapter_state,
    find_record,
    host_copy,
    load_adapter_state,
    load_training_state,
    records,
    training_state,
)
from petl_kernels.methods.foreign import check_adaptable, check_no_peft, check_unwrapped
from petl_kernels.methods.ia3 import IA3
from petl_kernels.methods.lora import LoRA
from petl_kernels.methods.state_dicts import ASIDE
from petl_kernels.ops.quantized import QuantizedTensor

_FORMATS = (peft_format, native_format)
_TRAINING = "petl_training.safetensors"  # what training has in another form than is stored


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Write the adapter `name` (default: the active one) and return the folder that holds its two files.

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
    """Write every adapter of `model` into a subfolder of its name, as in ``save_pretrained`` and Trainer's checkpoints:
    the files of ``save_adapter``, and what training goes on from where that is another form (prefix-tuning).

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
    """Put the adapter of `folder` (PEFT's format or ours) into `model`, make it the active one, return the model.

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
    """Give the active adapter of ``model`` the values of the one in ``folder``, which has its name; returns the model.

    Raises InputError as ``load_adapter`` does.
    """
    home, name = _find(Path(folder), None)
    load_adapter_state(model, name, _read(model, home)[1])
    return model


def fill_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Give every adapter of ``model`` the values that ``write_adapters`` has put into ``folder``, bit for bit.

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
    """Names of the adapters in subfolders of ``folder``, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and _holds_adapter(child))


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` has the plain model's tensors and state, and tensors of its adapters are not missed when others
    are loaded. Afterwards the same adapter is active and the same parameters require grad.

    Raises InputError where the active adapter is merged.
    """
    name, trained = active_name(model), {parameter for parameter in model.parameters() if parameter.requires_grad}
    use_adapter(model, None)
    model.petl_base_only = True
    try:
        yield
    finally:
        del model.petl_base_only
        use_adapter(model, name)
        for parameter in model.parameters():
            if parameter.requires_grad != (parameter in trained):
                parameter.requires_grad_(parameter in trained)


def plain_state(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """``state`` (the model's own tensors by name, when not given) without adapters: the base's values also where the
    active adapter trains base tensors, unless it is merged. Quantized tensors are dense, tied ones still one.

    Raises InputError for a state of other shapes than the model's, such as parts of a model on several devices.
    """
    name = active_name(model)
    record = None if name is None else records(model)[name]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    other = _dense(model)
    if record is not None and not record.merged:
        other |= {id(parameters[key]): kept for key, kept in record.base.items()}
    own = adapter_parameters(model)
    given = model.state_dict(keep_vars=True) if state is None else state
    found = {}
    for key, tensor in given.items():
        parameter = parameters.get(key)
        if parameter is not None and tensor.shape != parameter.shape:
            shapes = f"shape {tuple(tensor.shape)}, the model's has {tuple(parameter.shape)}"
            raise InputError(f"state_dict: {key!r} has {shapes}; adapters are saved from a whole model")
        if key not in own and not key.startswith(ASIDE):
            own_value = other[id(parameter)].to(tensor.dtype) if id(parameter) in other else tensor.detach()
            # What stands in wider memory, with others (layers/border.py), is no tensor that a file can have.
            found[key] = own_value if own_value.is_contiguous() else host_copy(own_value)
    return found


def save_merged(
    model: nn.Module,
    tokenizer,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write model, active adapter merged in, and tokenizer as a plain checkpoint that `transformers` loads unchanged.

    dtype: of all weights in the files; None: of each as the model has it. say: is called with a line on what rounding
    to `dtype` costs, where it costs anything.
    The model itself is the same afterwards. Quantized weights are merged into (see ``merge``) and written dense, with
    the values that they stand for: all of them are in host memory for that, as are those in another `dtype`. Raises
    InputError when the active adapter cannot be merged (adapters and prefixes add layers), the folder exists and is not
    empty, or a weight is beyond the range of `dtype`; OSError that names the folder when the disk is full.
    """
    check_free(folder)
    return write_merged(model, tokenizer, folder, dtype, say)


def write_merged(
    model: nn.Module,
    tokenizer,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """``save_merged`` into a folder that may exist: it is replaced as a whole."""
    folder = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"dtype {dtype}: expected a floating-point type")
    name = active_name(model)
    was_merged = name is None or find_record(model, name).merged
    if not was_merged:
        merge(model)
    try:
        state = plain_state(model)
        if dtype is not None:
            before = (find_record(model, name).unmerged or {}) if name is not None else {}
            state, cost = _rounded(state, dtype, before)
            if say is not None and cost:
                say(cost)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(folder) as temporary:
            with saved_as_it_is(model, state):
                model.save_pretrained(temporary, state_dict=state)
            if dtype is not None:
                _write_dtype(temporary / "config.json", dtype)
            tokenizer.save_pretrained(temporary)
    finally:
        if not was_merged:
            unmerge(model)
    return folder


def check_free(folder: str | os.PathLike) -> None:
    """Refuse a folder that is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {str(folder)!r} exists and is not empty")


def _dense(model: nn.Module) -> dict[int, torch.Tensor]:
    """id of each quantized parameter -> its values, on the CPU."""
    quantized = (parameter for parameter in model.parameters() if isinstance(parameter, QuantizedTensor))
    return {id(parameter): parameter.dequantize().cpu() for parameter in quantized}


def _rounded(
    state: dict[str, torch.Tensor], dtype: torch.dtype, before: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """``state`` in ``dtype``, tied tensors still one, and a line on what that costs; empty when all stays as it was.

    before: the weights of ``state`` that a merge has changed, as they were. Raises InputError for what does not fit."""
    rounded: dict[tuple, torch.Tensor] = {}
    worst, lost, changed = 0.0, 0.0, 0.0
    for key, tensor in state.items():
        place = _place(tensor)
        if place in rounded or not tensor.is_floating_point():
            continue
        values = tensor.detach().cpu()
        new = rounded[place] = values.to(dtype)
        if values.isfinite().all() and not new.isfinite().all():
            largest, limit = values.abs().max().item(), torch.finfo(dtype).max
            raise InputError(f"dtype {dtype}: {key} has a value of {largest:.4g}, expected at most {limit:.4g}")
        size, error = values.float().norm().item(), (new.float() - values.float()).norm().item()
        worst = max(worst, error / size if size else 0.0)
        if key in before and before[key].shape == values.shape:
            old = before[key].dequantize() if isinstance(before[key], QuantizedTensor) else before[key]
            lost, changed = lost + error**2, changed + (values.float() - old.detach().cpu().float()).norm().item() ** 2
    line = f"rounded to {str(dtype).removeprefix('torch.')}: a relative error of at most {worst:.2g} in a weight"
    if changed:
        line += f", {(lost / changed) ** 0.5:.2%} of what the adapter changes"
    return {key: rounded.get(_place(tensor), tensor.detach()) for key, tensor in state.items()}, line if worst else ""


def _place(tensor: torch.Tensor) -> tuple:
    """Returns the same for tied tensors, and for no others."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _write_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a config that ``save_pretrained`` has written name the dtype of the files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pick_name(model: nn.Module, name: str | None) -> str:
    if name is not None:
        return name
    if active_name(model) is not None:
        return active_name(model)
    known = list(records(model))
    if len(known) == 1:
        return known[0]
    which = f"name one of {', '.join(known)}" if known else "the model has no adapter"
    raise InputError(f"no adapter is active: {which}")


def _read(model: nn.Module, home: Path) -> tuple[Method, dict[str, torch.Tensor]]:
    reader = next(reader for reader in _FORMATS if (home / reader.CONFIG).is_file())
    return reader.read(home, model)


def _check_same(model: nn.Module, home: Path, here: Method, there: Method) -> None:
    """Refuse an adapter in ``home`` that computes something else with the same tensors."""
    ours, theirs = _computes(model, here), _computes(model, there)
    for what in {**ours, **theirs}:
        if ours.get(what) != theirs.get(what):
            raise InputError(f"{home}: {what} {theirs.get(what)!r}, and this model's adapter has {ours.get(what)!r}")


def _computes(model: nn.Module, config: Method) -> dict[str, object]:
    """Everything that a method computes with beside its tensors: what -> value. Dropout is for training to choose."""
    if isinstance(config, LoRA):
        plan = config.resolve(model)
        return {f"(rank, scale) of {path!r}": values for path, values in plan.items()} | {"bias": config.bias}
    if isinstance(config, IA3):
        return {f"input scaled of {path!r}": value for path, value in config.places(model).items()}
    return {"method": config.label} if peft_format.can_write(config) else config.to_dict()


def _holds_adapter(folder: Path) -> bool:
    return any((folder / reader.CONFIG).is_file() for reader in _FORMATS)


def _find(folder: Path, name: str | None) -> tuple[Path, str]:
    """(folder with the two files, the adapter's name in the model)."""
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
    """Adapt a copy of the model that has shapes but no values, and compare: the model itself stays untouched."""
    shapes = _without_values(model)
    try:
        adapt(shapes, config, name)
        load_adapter_state(shapes, name, {key: tensor.to("meta") for key, tensor in state.items()})
    except InputError as error:
        raise InputError(f"{home}: {error}") from error


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device; tied parameters stay tied."""
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
