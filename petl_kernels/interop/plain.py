"""The plain model of an adapted one: its tensors without adapters, or with the active one merged in, and its files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir
from petl_kernels.methods.adapt import use_adapter
from petl_kernels.methods.merge import merge, unmerge
from petl_kernels.methods.owner import active_name, adapter_parameters, find_record, own, records
from petl_kernels.methods.state_dicts import ASIDE
from petl_kernels.methods.values import host_copy
from petl_kernels.ops.quantized import QuantizedTensor

# The model that ``save_pretrained`` writes as it is just now, and its state.
_SAVED: ContextVar[tuple[nn.Module, dict[str, torch.Tensor]] | None] = ContextVar("petl_saved", default=None)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` has the plain model's tensors and state, and tensors of its adapters are not missed when others
    are loaded. Afterwards the same adapter is active and the same parameters require grad.

    Raises InputError where the active adapter is merged.
    """
    name, trained = active_name(model), {parameter for parameter in model.parameters() if parameter.requires_grad}
    use_adapter(model, None)
    own(model).base_only = True
    try:
        yield
    finally:
        own(model).base_only = False
        use_adapter(model, name)
        for parameter in model.parameters():
            if parameter.requires_grad != (parameter in trained):
                parameter.requires_grad_(parameter in trained)


def plain_state(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Returns ``state`` (the model's own tensors by name, when not given) without adapters.

    It has the base's values also where the active adapter trains base tensors, unless that is merged. Quantized tensors
    are dense, tied ones still one.

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
            # A tensor that stands in wider memory, with others (layers/border.py), cannot be written as it is.
            found[key] = own_value if own_value.is_contiguous() else host_copy(own_value)
    return found


def save_merged(
    model: nn.Module,
    tokenizer,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes model, active adapter merged in, and tokenizer as a plain checkpoint that `transformers` loads unchanged.

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
    """Does what ``save_merged`` does, into a folder that may exist: it is replaced as a whole."""
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
                model.save_pretrained(temporary, state_dict=state)  # pyright: ignore[reportCallIssue]
            if dtype is not None:
                _write_dtype(temporary / "config.json", dtype)
            tokenizer.save_pretrained(temporary)
    finally:
        if not was_merged:
            unmerge(model)
    return folder


@contextlib.contextmanager
def saved_as_it_is(model: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, ``model.save_pretrained`` writes no adapters beside the model; it writes ``state`` where a subclass with
    a ``save_pretrained`` of its own gives no other."""
    token = _SAVED.set((model, state))
    try:
        yield
    finally:
        _SAVED.reset(token)


def state_to_save(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Returns the state of ``saved_as_it_is`` for ``model``; None outside of it."""
    saved = _SAVED.get()
    return saved[1] if saved is not None and saved[0] is model else None


def check_free(folder: str | os.PathLike) -> None:
    """Raises InputError for a folder that is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {str(folder)!r} exists and is not empty")


def _dense(model: nn.Module) -> dict[int, torch.Tensor]:
    """Returns id of each quantized parameter -> its values, on the CPU."""
    quantized = (parameter for parameter in model.parameters() if isinstance(parameter, QuantizedTensor))
    return {id(parameter): parameter.dequantize().cpu() for parameter in quantized}


def _rounded(
    state: dict[str, torch.Tensor], dtype: torch.dtype, before: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Returns ``state`` in ``dtype``, tied tensors still one, and a line on what that costs, which may be empty.

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
    """Writes the dtype of the files into a config that ``save_pretrained`` has written."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
