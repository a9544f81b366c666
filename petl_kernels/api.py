"""Adapt a model, switch between its adapters, merge one into it, and say what is trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from petl_kernels import ops
from petl_kernels.dispatch import turned_down
from petl_kernels.errors import InputError, shown
from petl_kernels.layers.lean import LayerState, layer_states, lean_layers, widen
from petl_kernels.layers.loss.lean_loss import lean_loss, loss_states, plain_loss, set_chunk_bytes
from petl_kernels.methods.base import (
    Method,
    Named,
    Record,
    activate,
    active_name,
    adapter_state,
    add_record,
    discard,
    find_record,
    pieces,
    records,
    run_pieces,
    set_parameter,
    stored_as,
)
from petl_kernels.methods.foreign import check_adaptable, check_unwrapped
from petl_kernels.models.structure import check_model, total_parameters
from petl_kernels.ops.quantized import QuantizedTensor
from petl_kernels.units import format_size

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def adapt(model: nn.Module, config: Method, name: str = "default") -> nn.Module:
    """Freeze ``model``, put what ``config`` trains into it under ``name``, make that active and return the model.

    The model is changed in place; its modules keep their paths and its parameters their names. Several adapters can be
    on one model under different names: one of them is active at a time (``use_adapter``).
    Raises InputError, with the model as it was: a name that is taken or no name, targets that match nothing, a rank
    larger than a layer, a model of a family that it does not cover, one that is wrapped (DataParallel, compiled)
    or that PEFT or a parametrization has changed.
    """
    check_adaptable(model)
    if not isinstance(config, Method):
        raise InputError(f"config {shown(config)}: expected a method's config, such as LoRA(rank=16)")
    _check_new_name(model, name)
    _refuse_merged(model, "adapting")
    before, required = active_name(model), set(trainable_parameters(model))
    activate(model, None)
    try:
        add_record(model, config, name)
    except Exception:
        discard(model, name)
        activate(model, before)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in required)
        raise
    activate(model, name)
    widen(model)
    return model


def use_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Make ``name`` the adapter that ``model`` runs and trains; None is the plain, frozen base.

    Base tensors that an adapter has trained are swapped in and out exactly.
    """
    check_unwrapped(model)
    if name is not None:
        find_record(model, name)
    if name != active_name(model):
        _refuse_merged(model, "switching")
        activate(model, name)
        widen(model)
    return model


def lean(
    model: nn.Module,
    tier: int | Sequence[int] | Literal["auto"] = 2,
    *,
    memory: str | int | None = None,
    batch_tokens: int = 4096,
    max_length: int = 256,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """Let ``model`` keep less between forward and backward, with the same gradients; in place, returns the model.

    tier: for all layers, or a list with one for each layer, encoder first. What a layer keeps of each token:
        1  its input, q, k, v, the attentions' outputs, the sums between its blocks, one bit for each ReLU
        2  as 1 without q, k and v, which are computed again (and fc1 where the activation is not ReLU)
        3  as 2 without the sums, which are computed again through the output projections
        4  its input, and everything is computed again
        5  as 4, with the input in host memory
        0  what it kept before ``lean``
    "auto": for each layer the tier with the least work, such that a step fits into ``memory`` bytes ("8GiB"; all that
    is free, when not given) with AdamW on batches of ``batch_tokens`` padded tokens of the longer side, in sentences of
    up to ``max_length``, under torch.autocast in the dtype ``autocast``, if any. It sets tiers and the loss' chunk;
    weights stay as and where they are. ``plan`` has more levers. The keyword arguments are for "auto" alone.
    ``model(labels=...)`` then computes the loss without logits, in models whose own loss is known to be the
    cross-entropy of logits. They stand in the output as before and are made when they are read, which raises
    RuntimeError where weights have changed since.
    Layers and models that cannot be lean stay as they are; ``report`` names them and says why.
    Raises InputError for a tier that does not exist, for a list of another length, and with "auto" for what does not
    fit (with the bytes it needs), for a memory that is no size and for a model of another family.
    """
    check_model(model)
    if isinstance(tier, str) and tier == "auto":
        from petl_kernels.planning.planner import tiers_in_place  # which stands above this module

        tier, chunk_bytes = tiers_in_place(model, memory, batch_tokens, max_length, autocast)
        lean_layers(model, tier)
        set_chunk_bytes(lean_loss(model), chunk_bytes)
        return model
    if memory is not None:
        raise InputError(f"memory {shown(memory)}: expected with tier 'auto' only, and tier is {shown(tier)}")
    lean_layers(model, tier)
    return plain_loss(model) if tier == 0 else lean_loss(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of ``model`` that require grad, shared ones once, for an optimiser."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge(model: nn.Module) -> nn.Module:
    """Put the active adapter into the base weights: the plain model then computes what the adapted one did.

    A quantized weight is quantized again, one after the other, and so rounded: ``report`` has the largest relative
    error. To merge without it, put the adapter on the original checkpoint. A tied weight that changes in one place only
    (LoRA on the output projection) is untied, in the config too. The weights from before are kept in host memory for
    ``unmerge``. Methods that train base tensors have nothing to merge.
    Raises InputError for methods that no weight can hold (bottleneck adapters, prefixes, BitFit on T5).
    """
    check_unwrapped(model)
    name = active_name(model)
    if name is None:
        raise InputError("merge: no adapter of the model is active")
    _refuse_merged(model, "merging")
    record = records(model)[name]
    new, errors = {}, []
    for key, values in record.config.merged_weights(model, name):
        new[key], error = stored_as(model.get_parameter(key), values)
        errors += [error] if error is not None else []
        del values  # before the next are made
    record.unmerged, record.merge_error = {}, max(errors, default=None)
    for key, tensor in _untied(model, record, new).items():
        record.unmerged[key] = model.get_parameter(key)
        set_parameter(model, key, nn.Parameter(tensor, requires_grad=False))
    for original in set(record.unmerged.values()):  # no module holds them now
        if not original.is_meta:
            _move(original, torch.device("cpu"))
    run_pieces(model, None)
    model.requires_grad_(False)
    widen(model)
    return model


def _untied(model: nn.Module, record: Record, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``new`` with a copy for every parameter that is tied to one in it; the config is told."""
    names: dict[nn.Parameter, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(key)
    # all of a tied group become parameters of their own, since transformers ties all of it or none
    copies = {
        other: parameter.detach().clone()
        for parameter, group in names.items()
        if len(group) > 1 and not new.keys().isdisjoint(group)
        for other in group
        if other not in new
    }
    config = getattr(model, "config", None)
    if copies and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings, record.was_tied = False, True
    return {**copies, **new}


def unmerge(model: nn.Module) -> nn.Module:
    """Undo ``merge``: the weights of before, bit for bit, with their ties, and the adapter beside them again."""
    check_unwrapped(model)
    name = active_name(model)
    if name is None or not records(model)[name].merged:
        raise InputError("unmerge: no adapter of the model is merged")
    record = records(model)[name]
    for key, original in record.unmerged.items():
        _move(original, model.get_parameter(key).device)
        set_parameter(model, key, original)
    record.unmerged = record.merge_error = None
    if record.was_tied:
        model.config.tie_word_embeddings, record.was_tied = True, False
    activate(model, name)
    widen(model)
    return model


def _move(parameter: nn.Parameter, device: torch.device) -> None:
    """To ``device``, in place: a tied parameter stays one."""
    if parameter.device == device:
        return
    if isinstance(parameter, QuantizedTensor):  # its data cannot change device
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.to(device), requires_grad=False))
    else:
        parameter.data = parameter.data.to(device)


def _check_new_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"adapter name {shown(name)}: expected letters, digits, - and _")
    if hasattr(Named(), name):  # names are keys of module dictionaries
        raise InputError(f"adapter name {name!r}: an attribute of PyTorch modules, choose another name")
    if name in records(model):
        raise InputError(f"adapter {name!r}: already on this model, choose another name")


def _refuse_merged(model: nn.Module, doing: str) -> None:
    name = active_name(model)
    if name is not None and records(model)[name].merged:
        raise InputError(f"adapter {name!r}: merged into the model, unmerge it before {doing}")


@dataclass(frozen=True)
class Report:
    """Says what trains in a model. ``str`` of it is a table.

    settings: those of the config that differ from its defaults, and its size. trained, stored, total and frozen are
    numbers of parameters; stored is less than trained where training uses another form (prefix-tuning).
    storage: how frozen weights are held, where that is not as they are; streamed: how many layers live elsewhere.
    places: (module with layer numbers as *, what is trained there, modules, parameters). backends: op -> backend that
    serves it here. turned_down: a line for each backend that does not serve an op on this device in some dtype,
    because it was found to compute something else than the reference. merge_error: ‖Ŵ - W‖ / ‖W‖, the
    largest, of quantized weights Ŵ that should be W with the adapter in it. layers: path, tier and, for one that cannot
    be lean, the reason. loss: how the loss is computed.
    """

    model: str
    adapter: str | None
    method: str | None
    settings: dict[str, Any]
    trained: int
    stored: int
    total: int
    frozen: int
    merged: bool
    merge_error: float | None
    others: tuple[str, ...]
    places: tuple[tuple[str, str, int, int], ...]
    backends: dict[str, str]
    layers: tuple[LayerState, ...]
    loss: str
    storage: str
    streamed: int
    turned_down: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Stored parameters over those of the plain model."""
        return self.stored / self.total

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        if self.adapter is None:
            lines = [f"{self.model}: no adapter is active; trained {self.trained:,} of {self.total:,} parameters"]
        else:
            settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
            title = f"{self.model}, adapter {self.adapter!r}: {self.method}"
            lines = [
                title + (f" ({settings})" if settings else "") + self._merged(),
                f"trained {self.trained:,}, stored {self.stored:,} = {self.share:.3%} of {self.total:,} parameters; "
                f"frozen {self.frozen:,}",
            ]
        if self.others:
            lines.append(f"other adapters: {', '.join(self.others)}")
        left = max((len(where) for where, *_ in self.places), default=0)
        right = max((len(what) for _, what, *_ in self.places), default=0)
        for where, what, modules, n in self.places:
            lines.append(f"  {where:<{left}}  {what:<{right}}  {modules:>3} modules {n:>13,}")
        lines += [f"{op} served by {backend}" for op, backend in self.backends.items()]
        lines += [*self.turned_down, *_lean_lines(self.layers), self.loss]
        if self.storage:
            lines.append(f"frozen weights: {self.storage}")
        if self.streamed:
            lines.append(f"streamed: {self.streamed} layers")
        return "\n".join(lines)

    def _merged(self) -> str:
        if self.merge_error is not None:
            return f", merged into quantized weights with a relative error of at most {self.merge_error:.2%}"
        return ", merged" if self.merged else ""


def _lean_lines(layers: tuple[LayerState, ...]) -> list[str]:
    tiers = Counter(layer.tier for layer in layers if layer.tier)
    lean = [f"lean: {n} of {len(layers)} layers at tier {tier}" for tier, n in sorted(tiers.items())]
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(layer.path)
    plain = [f"not lean: {paths[0]} and {len(paths) - 1} more: {why}" for why, paths in reasons.items()]
    composed: dict[str, list[str]] = {}
    for layer in layers:
        if layer.composed:
            composed.setdefault(layer.composed, []).append(layer.path)
    plain += [f"lean op by op: {paths[0]} and {len(paths) - 1} more: {why}" for why, paths in composed.items()]
    return [*(lean or ["lean: no layer"]), *(line.replace(" and 0 more", "") for line in plain)]


def _loss_line(model: nn.Module) -> str:
    states = loss_states(model)
    if not states:
        return "loss: the model's own, from logits"
    lines = []
    for module, lean, reason in states:
        line = "without logits" if lean else "the model's own, from logits"
        where = "" if module is model else f" in {type(module).__name__}"
        lines.append(line + where + (f" ({reason})" if reason else ""))
    return "loss: " + "; ".join(dict.fromkeys(lines))


def _storage_line(model: nn.Module) -> str:
    quantized = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    if not quantized:
        return ""
    storages = ", ".join(sorted({p.storage for p in quantized}))
    stored = sum(part.nbytes for p in quantized for part in p.parts())
    return f"{len(quantized)} in {storages}, {format_size(stored)}"


def _streamed_layers(model: nn.Module) -> int:
    streamed = getattr(model, "petl_streamed", None)
    return 0 if streamed is None else len(streamed.paths)


def report(model: nn.Module) -> Report:
    """Returns what trains in ``model``: method, numbers of parameters, their places, and which backend serves them."""
    check_unwrapped(model)
    name = active_name(model)
    total = total_parameters(model)
    others = tuple(other for other in records(model) if other != name)
    parameters = trainable_parameters(model)
    trained = sum(p.numel() for p in parameters)
    lean = tuple(layer_states(model)), _loss_line(model), _storage_line(model), _streamed_layers(model)
    if name is None:
        return Report(
            type(model).__name__,
            None,
            None,
            {},
            trained,
            trained,
            total,
            total - trained,
            False,
            None,
            others,
            (),
            {},
            *lean,
            _turned_down(model),
        )
    record = records(model)[name]
    settings = {
        field.name: getattr(record.config, field.name)
        for field in fields(record.config)
        if field.name == record.config.size_field or getattr(record.config, field.name) not in (field.default, {})
    }
    own = {p for _, piece in pieces(model, name) for p in piece.parameters()} | set(record.added.values())
    weight = next(model.parameters())
    return Report(
        model=type(model).__name__,
        adapter=name,
        method=record.config.label,
        settings=settings,
        trained=trained,
        stored=sum(tensor.numel() for tensor in adapter_state(model, name).values()),
        total=total,
        frozen=total - sum(p.numel() for p in parameters if p not in own),
        merged=record.merged,
        merge_error=record.merge_error,
        others=others,
        places=() if record.merged else _places(model, name, record),
        backends={op: ops.backend_of(op, weight.device, weight.dtype) for op in record.config.ops},
        layers=lean[0],
        loss=lean[1],
        storage=lean[2],
        streamed=lean[3],
        turned_down=_turned_down(model),  # after ``backends``, which makes checks
    )


def _turned_down(model: nn.Module) -> tuple[str, ...]:
    devices = {parameter.device for parameter in model.parameters()}
    return tuple(str(backend) for backend in turned_down() if backend.device in devices)


def _places(model: nn.Module, name: str, record: Record) -> tuple[tuple[str, str, int, int], ...]:
    """(module with layer numbers as *, what is trained there, modules, parameters), in the model's order."""
    found = [(path, piece.what, sum(p.numel() for p in piece.parameters())) for path, piece in pieces(model, name)]
    owners: dict[str, dict[str, int]] = {}
    for key in (*record.base, *record.added):
        path, _, attribute = key.rpartition(".")
        owners.setdefault(path, {})[attribute] = model.get_parameter(key).numel()
    found += [(path, ", ".join(numbers), sum(numbers.values())) for path, numbers in owners.items()]
    table: dict[tuple[str, str], tuple[int, int]] = {}
    for path, what, n in found:
        row = re.sub(r"\.\d+(?=\.|$)", ".*", path) or type(model).__name__, what
        modules, total = table.get(row, (0, 0))
        if n:
            table[row] = (modules + 1, total + n)
    return tuple((*row, *numbers) for row, numbers in table.items())
