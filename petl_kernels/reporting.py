"""``report``: what trains in a model, and how it is held and computed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from petl_kernels import ops
from petl_kernels.dispatch import turned_down
from petl_kernels.layers.lean import LayerState, layer_states
from petl_kernels.layers.loss.lean_loss import loss_states
from petl_kernels.methods.adapt import trainable_parameters
from petl_kernels.methods.foreign import check_unwrapped
from petl_kernels.methods.owner import Record, active_name, owner, records
from petl_kernels.methods.pieces import pieces
from petl_kernels.methods.state import adapter_state
from petl_kernels.models.structure import total_parameters
from petl_kernels.ops.quantized import QuantizedTensor
from petl_kernels.units import format_size


@dataclass(frozen=True)
class Report:
    """Says what trains in a model. ``str`` of it is a table.

    settings: those of the config that differ from its defaults, and its size. trained, stored, total and frozen are
    numbers of parameters; stored is less than trained where training uses another form (prefix-tuning).
    storage: how frozen weights are held, where that is not as they are; streamed: how many layers live elsewhere.
    places: (module with layer numbers as *, what is trained there, modules, parameters). backends: op -> backend that
    serves it here. turned_down: a line for each backend that does not serve an op on this device in some dtype,
    because it was found to compute something else than the reference, or the card lacks the dtype. merge_error:
    ‖Ŵ - W‖ / ‖W‖, the largest, of quantized weights Ŵ that should be W with the adapter in it. layers: path, tier and,
    for one that cannot be lean, the reason, for a lean one what in it is the model's own. loss: how the loss is
    computed.
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
    lines = lean or ["lean: no layer"]
    for what, name in (("not lean", "reason"), ("lean op by op", "composed"), ("the model's own in", "own")):
        paths: dict[str, list[str]] = {}
        for layer in layers:
            paths.setdefault(getattr(layer, name), []).append(layer.path)
        lines += [_line(what, found, why) for why, found in paths.items() if why]
    return lines


def _line(what: str, paths: list[str], why: str) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{what}: {paths[0]}{more}: {why}"


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
    streamed = owner(model).streamed
    return 0 if streamed is None else len(streamed.paths)


def report(model: nn.Module) -> Report:
    """Returns what trains in ``model``: method, numbers of parameters, their places, and which backend serves them."""
    check_unwrapped(model)
    name = active_name(model)
    total = total_parameters(model)
    parameters = trainable_parameters(model)
    trained = sum(p.numel() for p in parameters)
    whole = {
        "model": type(model).__name__,
        "adapter": name,
        "trained": trained,
        "total": total,
        "others": tuple(other for other in records(model) if other != name),
        "layers": tuple(layer_states(model)),
        "loss": _loss_line(model),
        "storage": _storage_line(model),
        "streamed": _streamed_layers(model),
    }
    if name is None:
        return Report(
            **whole,
            method=None,
            settings={},
            stored=trained,
            frozen=total - trained,
            merged=False,
            merge_error=None,
            places=(),
            backends={},
            turned_down=_turned_down(model),
        )
    record = records(model)[name]
    own = {p for _, piece in pieces(model, name) for p in piece.parameters()} | set(record.added.values())
    weight = next(model.parameters())
    return Report(
        **whole,
        method=record.config.label,
        settings={
            field.name: getattr(record.config, field.name)
            for field in fields(record.config)
            if field.name == record.config.size_field or getattr(record.config, field.name) not in (field.default, {})
        },
        stored=sum(tensor.numel() for tensor in adapter_state(model, name).values()),
        frozen=total - sum(p.numel() for p in parameters if p not in own),
        merged=record.merged,
        merge_error=record.merge_error,
        places=() if record.merged else _places(model, name, record),
        backends={op: ops.backend_of(op, weight.device, weight.dtype) for op in record.config.ops},
        turned_down=_turned_down(model),  # after ``backends``, which makes checks
    )


def _turned_down(model: nn.Module) -> tuple[str, ...]:
    devices = {parameter.device for parameter in model.parameters()}
    return tuple(str(backend) for backend in turned_down() if backend.device in devices)


def _places(model: nn.Module, name: str, record: Record) -> tuple[tuple[str, str, int, int], ...]:
    """Returns (module with layer numbers as *, what is trained there, modules, parameters), in the model's order."""
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
