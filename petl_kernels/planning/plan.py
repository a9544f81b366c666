"""A plan: how one update is computed inside a budget of bytes, as a table that a person reads, and as a file.

``planner.plan`` finds one; ``apply`` puts it on a model.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petl_kernels.errors import InputError, shown
from petl_kernels.files import atomic_write
from petl_kernels.layers.lean_model import lean_model
from petl_kernels.models.structure import check_model, describe
from petl_kernels.planning.beam_search import SearchBytes
from petl_kernels.planning.levers import CHUNKS, STORAGES, Levers
from petl_kernels.planning.resident import GRADIENT_BYTES, OPTIMIZER_BYTES, SLOTS
from petl_kernels.step.gradients import RoundedGradients
from petl_kernels.units import format_size
from petl_kernels.weights.quantized import quantize_model
from petl_kernels.weights.streamed import stream_layers

APPROXIMATIONS = {
    "quantized": "frozen weights rounded to 8 or 4 bits",
    "8bit-optimizer": "moments of AdamW rounded to 8 bits",
    "bf16-gradients": "gradients of what is trained rounded to 16 bits between micro-batches",
}
LOADING = "while loading"  # the part of ``Plan.host`` that is there before the others
INPUTS = "inputs of tier 5"  # the part of it that depends on tiers and rows
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Plan:
    """How one update is computed inside ``memory`` bytes, and what that takes.

    rows: sentence pairs of the longest kind in a micro-batch of ``micro_tokens``; micro_batches of them make an update.
    tiers: one for each layer, encoder first. storage: of frozen weights in layers. tables: of frozen token embeddings
    and the output projection; as ``storage`` when not given. gradients: their dtype between micro-batches. streamed:
    how many layers live in host memory. copies_hidden: whether the copy of one takes no longer than the matrix work of
    another. precision: of matrix products. cuda_graphs: whether steps may be captured, for which the plan leaves room.
    parts: bytes by purpose, which add up to ``peak``. seconds: of an update, by the rates of the device.
    more: (budget, seconds, levers) of larger budgets that would be faster. search: bytes that an evaluation may take,
    and those that beam search takes. host: on CUDA, bytes of host memory by purpose, and "while loading" all of them at
    that time; empty on a CPU, where ``memory`` is host memory. host_memory: the limit for them, if there was one.
    input_bytes: of one layer's input of one sentence pair, which tier 5 holds there.
    """

    model: str
    parameters: int
    memory: int
    device: str
    precision: str
    batch_tokens: int
    longest: int
    rows: int
    micro_tokens: int
    micro_batches: int
    tiers: tuple[int, ...]
    chunk_bytes: int
    storage: str
    optimizer: str
    streamed: int
    evaluation_tokens: int
    peak: int
    parts: dict[str, int]
    seconds: float
    rates_measured: bool
    approximations: tuple[str, ...]
    copies_hidden: bool = True
    more: tuple[tuple[int, float, str], ...] = ()
    tables: str | None = None
    gradients: str = "float32"
    cuda_graphs: bool = False
    search: SearchBytes | None = None
    host: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    host_memory: int | None = None
    input_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", self.tables or self.storage)

    def apply(self, model: nn.Module, folder: str | Path | None = None, files: Sequence[Path] = ()) -> nn.Module:
        """Puts the plan's tiers, storage, streamed layers and chunk on ``model``, in place; returns it.

        Where gradients wait in bf16, ``model.petl_gradients`` (``RoundedGradients``) clips and steps for the loop.

        On the CPU streamed layers are read from ``files`` (safetensors that hold them already) or from a file that is
        written into ``folder``, a temporary one when not given. Raises InputError when the plan is for another model.
        """
        self.check(model)
        if (self.storage, self.tables) != ("dense", "dense"):
            quantize_model(model, self.storage, self.tables)
        if self.streamed:
            paths = [layer.path for layer in describe(model).layers[: self.streamed]]
            with tempfile.TemporaryDirectory() as own:  # its file is mapped, and needs no name after that
                stream_layers(model, paths, SLOTS, folder or own, files, device=self.device)
        lean_model(model, self.tiers, self.chunk_bytes)  # after streaming: it moves weights that stay
        self._set_gradients(model)
        return model

    def _set_gradients(self, model: Any) -> None:
        if (earlier := getattr(model, "petl_gradients", None)) is not None:
            earlier.close()
            model.petl_gradients = None
        if self.gradients == "bfloat16":
            model.petl_gradients = RoundedGradients(p for p in model.parameters() if p.requires_grad)

    def tighter(self) -> Plan | None:
        """Returns the next plan that takes less and computes the same, at last without CUDA graphs; None after it."""
        if self.rows > 1:
            pairs = -(-self.rows // 2)
            return self._with(
                rows=pairs,
                micro_tokens=pairs * self.longest,
                micro_batches=-(-self.rows * self.micro_batches // pairs),
            )
        on_host = self.device.startswith("cuda") and not self.cuda_graphs
        for tier in (5, 4) if on_host else (4,):
            found = self._with(tiers=(tier,) * len(self.tiers))
            if self.tiers == found.tiers:
                break
            if found.host_memory is None or host_peak(found.host) <= found.host_memory:
                return found
        smaller = [chunk for chunk in CHUNKS if chunk < self.chunk_bytes]
        if smaller:
            return dataclasses.replace(self, chunk_bytes=smaller[0])
        return dataclasses.replace(self, cuda_graphs=False) if self.cuda_graphs else None

    def check(self, model: nn.Module) -> None:
        """Raises InputError unless the plan is for a model of this class and size."""
        check_model(model)
        found = type(model).__name__, sum(p.numel() for p in model.parameters())
        if found != (self.model, self.parameters):
            raise InputError(
                f"plan: for {self.model} with {self.parameters:,} parameters; the model is {found[0]} with {found[1]:,}"
            )

    def _with(self, **changes: Any) -> Plan:
        """Returns the plan with other rows or tiers, and what these take of the host."""
        found = dataclasses.replace(self, **changes)
        if not self.host or not self.input_bytes:  # a plan of an earlier version does not have them
            return found
        inputs = found.tiers.count(5) * found.rows * found.input_bytes
        host = {name: size for name, size in self.host.items() if name != INPUTS}
        return dataclasses.replace(found, host=({INPUTS: inputs} if inputs else {}) | host)

    def forbidden(self, allow: Sequence[str], optimizer: str) -> str:
        """Returns the first approximation that it uses and that is not allowed, or "".

        optimizer: the one that the user has named, which is allowed by that.
        """
        allowed = [*allow, *(["8bit-optimizer"] if self.optimizer == optimizer else [])]
        return next((name for name in approximations_of(self) if name not in allowed), "")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they stand in a plan's file."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        with atomic_write(path) as file:
            json.dump(self.to_dict(), file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Returns the plan that ``save`` has written to ``path``. Raises InputError for a file that is none."""
        foreign = InputError(f"plan {path}: not a plan; expected a file of petl-mt plan --json")
        try:
            values: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"plan {path}: {error.strerror or error}; expected a file of petl-mt plan --json"
            ) from None
        except ValueError:
            raise foreign from None
        missing = _missing(values)
        if missing:
            older = InputError(f"plan {path}: has no {missing[0]}; expected a plan made anew by petl-mt plan --json")
            raise foreign if missing == _NEEDED else older
        try:
            for key in ("tiers", "approximations"):
                values[key] = tuple(values[key])
            values["more"] = tuple(tuple(more) for more in values["more"])
            if values.get("search"):
                values["search"] = SearchBytes(**values["search"])
            found = cls(**values)
            wrong = found._wrong()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise foreign from None
        if wrong:
            raise InputError(f"plan {path}: {wrong}")
        return found

    def _wrong(self) -> str:
        """Returns the first value that no plan can have, and what was expected; "" where all are possible."""
        for name in ("memory", "longest", "rows", "micro_tokens", "micro_batches", "chunk_bytes", "evaluation_tokens"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                return f"{name} is {value!r}; expected a whole number above 0"
        for tier in self.tiers:
            if tier not in range(6):
                return f"tier {tier!r}; expected 0 to 5"
        if self.streamed not in range(len(self.tiers) + 1):
            return f"streamed is {self.streamed!r}; expected 0 to its {len(self.tiers)} layers"
        known: tuple[tuple[str, Collection[str]], ...] = (
            ("precision", PRECISIONS.values()),
            ("storage", STORAGES),
            ("tables", STORAGES),
            ("gradients", GRADIENT_BYTES),
            ("optimizer", OPTIMIZER_BYTES),
        )
        for name, choices in known:
            if (value := getattr(self, name)) not in choices:
                return f"{name} is {value!r}; expected {' or '.join(choices)}"
        host: Any = self.host
        sizes: list[Any] = list(host.values())  # of what is no mapping: AttributeError, which ``load`` expects
        if not all(isinstance(size, int) for size in sizes):
            return f"host is {host!r}; expected bytes by purpose"
        if not isinstance(self.cuda_graphs, bool):  # pyright: ignore[reportUnnecessaryIsInstance]  # a file's
            return f"cuda_graphs is {self.cuda_graphs!r}; expected true or false"
        if self.cuda_graphs and (self.streamed or 5 in self.tiers or self.gradients != "float32"):
            return "cuda_graphs beside streamed layers, tier 5 or 16-bit gradients; expected a plan without these"
        return ""

    def __str__(self) -> str:
        return "\n".join([*_summary(self), *_table(self), *_more_lines(self)])


_NEEDED = [
    field.name
    for field in dataclasses.fields(Plan)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
]


def _missing(values: Any) -> list[str]:
    """Returns the fields that the content of a plan's file lacks; all where it is no object."""
    return [name for name in _NEEDED if name not in values] if isinstance(values, dict) else _NEEDED


def approximations_of(levers: Plan | Levers) -> tuple[str, ...]:
    """Returns the names of the approximations that a plan or its levers use."""
    used = {
        "quantized": (levers.storage, levers.tables) != ("dense", "dense"),
        "8bit-optimizer": levers.optimizer == "adamw8bit",
        "bf16-gradients": levers.gradients != "float32",
    }
    return tuple(name for name, is_used in used.items() if is_used)


def check_allow(allow: Sequence[str]) -> tuple[str, ...]:
    """Returns the approximations in ``allow``, with "quantised" for "quantized" accepted. Raises InputError."""
    if isinstance(allow, str) or not isinstance(allow, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"allow {shown(allow)}: expected a list of {', '.join(APPROXIMATIONS)}")
    names = tuple("quantized" if name == "quantised" else name for name in allow)
    for name in names:
        # one of another type may have no hash
        if not isinstance(name, str) or name not in APPROXIMATIONS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"allow {shown(name)}: expected {' or '.join(APPROXIMATIONS)}")
    return names


def levers_text(plan: Plan) -> str:
    """Returns the levers of ``plan`` as a line: micro-batches, tiers, and what differs from the plain training."""
    tiers = ", ".join(f"{plan.tiers.count(t)} × tier {t}" for t in sorted(set(plan.tiers)))
    words = [f"{plan.micro_batches} × {plan.micro_tokens:,} tokens", tiers]
    if plan.storage != plan.tables:
        words.append(f"layers {plan.storage}, embeddings and output projection {plan.tables}")
    elif plan.storage != "dense":
        words.append(plan.storage)
    if plan.streamed:
        words.append(f"{plan.streamed} layers streamed{'' if plan.copies_hidden else ' (slower than the matrix work)'}")
    if plan.optimizer != "adamw":
        words.append(plan.optimizer)
    if plan.gradients != "float32":
        words.append(f"gradients {plan.gradients}")
    return "; ".join(words)


def _summary(plan: Plan) -> list[str]:
    rates = "rates measured here" if plan.rates_measured else "rates assumed, no such device here"
    lines = [
        f"{plan.model}, {plan.parameters:,} parameters, {plan.device}, memory {format_size(plan.memory)} "
        f"({plan.memory / 1e9:.3g} GB)",
        f"update of {plan.batch_tokens:,} tokens: {levers_text(plan)}; loss in chunks of "
        f"{format_size(plan.chunk_bytes)}",
        f"about {plan.seconds:.3g} s an update ({rates}); evaluation in batches of {plan.evaluation_tokens:,} tokens",
    ]
    names = "; ".join(f"{name}: {APPROXIMATIONS[name]}" for name in plan.approximations)
    lines.append(f"approximations: {names}" if names else "exact: the gradients of the plain model")
    return [*lines, *_host_lines(plan)]


def _host_lines(plan: Plan) -> list[str]:
    """Returns a line on host memory where it is not the device's."""
    if not plan.host:
        return []
    stays = [f"{name} {format_size(size)}" for name, size in plan.host.items() if name != LOADING]
    line = f"host memory: {format_size(plan.host.get(LOADING, 0))} while loading; then {', '.join(stays) or 'none'}"
    return [line + (f"; of {format_size(plan.host_memory)}" if plan.host_memory else "")]


def host_peak(host: dict[str, int]) -> int:
    """Returns the most bytes of ``Plan.host`` at a time: while loading, or after it."""
    return max(host.get(LOADING, 0), sum(size for name, size in host.items() if name != LOADING))


def _table(plan: Plan) -> list[str]:
    lines = [*plan.parts.items(), ("peak", plan.peak), ("free", plan.memory - plan.peak)]
    return [f"  {name:<20} {format_size(size):>10}" for name, size in lines]


def _more_lines(plan: Plan) -> list[str]:
    return [f"with {format_size(memory)}: {seconds:.3g} s an update ({what})" for memory, seconds, what in plan.more]
