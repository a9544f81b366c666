"""The fastest way to train inside a budget of bytes, found before a weight is loaded.

    peak = weights by storage + trained + gradients + optimiser state              always there
         + Σ_layers kept(tier, batch) + what forward, loss or backward add at their worst   ``simulate``
         or what the optimiser's step adds, where that is more: backward keeps nothing for it
         + slack, and on CUDA the context

Bytes are counted by running the step on fake tensors at depths of one and two layers: they are exactly affine in the
number of layers of a kind. Levers: micro-batches, a tier for each layer, the loss' chunk, the storage of frozen
weights in layers and in tables (token embeddings, output projection), layers streamed from host memory, the dtype of
waiting gradients, 8-bit optimiser state. All are exact but those that ``allow`` names.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from petl_kernels.device import resolve
from petl_kernels.errors import InputError, check_whole, shown
from petl_kernels.methods.base import records
from petl_kernels.models.structure import Structure, check_model, describe
from petl_kernels.ops.quantized import parts_of
from petl_kernels.planning import simulate
from petl_kernels.planning.beam_search import Search, SearchBytes, output_length
from petl_kernels.planning.cost import LayerWork, Rates, layer_work, measure_rates, update_seconds
from petl_kernels.planning.plan import APPROXIMATIONS, CHUNKS, PRECISIONS, Plan, approximations_of, check_allow, levers
from petl_kernels.planning.resident import (
    CONTEXT,
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    SLACK,
    STEP_BYTES,
    STORAGES,
    FrozenWeights,
)
from petl_kernels.planning.simulate import Batch, Phases
from petl_kernels.step.gradients import groups
from petl_kernels.step.graphs import check_device, graph_bytes
from petl_kernels.units import format_below, format_least, format_size, parse_size
from petl_kernels.weights.streamed import copies_hide

GIB = 2**30
AUTOCAST = (None, torch.bfloat16, torch.float16)
EXACT = ("dense", "dense", "float32")  # storage, tables and gradients of a plan that rounds nothing


def plan(
    model: nn.Module,
    memory: str | int,
    batch_tokens: int = 4096,
    optimizer: str = "adamw",
    *,
    max_length: int = 256,
    allow: Sequence[str] = (),
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    tier: int | None = None,
    beam: int = 5,
    cuda_graphs: bool = False,
    packed: bool = False,
) -> Plan:
    """The fastest plan for training ``model``, adapted and possibly on the meta device, inside ``memory`` bytes.

    batch_tokens: padded tokens of the longer side in one update. max_length: tokens of the longest sentence. allow: the
    approximations that may be used, of ``APPROXIMATIONS``; none by default. autocast: the dtype of products, where the
    training loop uses ``torch.autocast``. tier: of all layers; chosen when not given. beam: of the evaluation's search.
    cuda_graphs: leave out what a graph cannot hold, and count what graphs take (``graphs.graph_bytes``).
    packed: micro-batches are packed rows (``pack``) where the model reads them, of at most ``micro_tokens`` a side.
    Raises InputError: a memory that is no size, or that nothing fits into (with the least that can), a model of another
    family, an approximation that does not exist, a budget above what the device has.
    """
    check_model(model)
    wanted, device = parse_size(memory), _device(device)
    allow = check_allow(allow)
    _check_arguments(batch_tokens, max_length, optimizer, wanted, device, autocast)
    check_whole("plan: beam", beam)
    if tier is not None:
        check_whole("tier", tier, 0, 5)
    if not isinstance(cuda_graphs, bool):
        raise InputError(f"cuda_graphs {shown(cuda_graphs)}: expected True or False")
    if not isinstance(packed, bool):
        raise InputError(f"packed {shown(packed)}: expected True or False")
    if cuda_graphs:
        check_device(device)
        if tier == 5:
            raise InputError("tier 5: a CUDA graph holds no inputs in host memory; expected 1 to 4 with cuda_graphs")
    given = model, batch_tokens, max_length, optimizer, allow, device, autocast, tier, beam
    planner = Planner(*given, graphs=cuda_graphs, packed=packed)
    return planner.best(wanted)


def tiers_in_place(
    model: nn.Module, memory: str | int | None, batch_tokens: int, max_length: int, autocast: torch.dtype | None
) -> tuple[tuple[int, ...], int]:
    """(a tier for each layer, the loss' chunk in bytes) of ``pk.lean(model, "auto")``."""
    describe(model)  # refuses what has no layers to plan for
    device = next(model.parameters()).device
    if device.type not in SLACK:
        raise InputError(f"tier 'auto': the model is on {str(device)!r}; expected cpu or cuda, or pk.plan for a device")
    wanted = _available(model, device) if memory is None else parse_size(memory)
    _check_arguments(batch_tokens, max_length, "adamw", wanted, device, autocast)
    return Planner(model, batch_tokens, max_length, "adamw", (), device, autocast).tiers_in_place(wanted)


def _available(model: nn.Module, device: torch.device) -> int:
    """What is free, and what ``model`` has of it already; on CUDA with the context, which a budget includes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(total, free + torch.cuda.memory_reserved(device) + CONTEXT)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise InputError(
            "tier 'auto': memory not given, and this system does not say; expected memory='8GiB'"
        ) from None
    return free + sum(part.nbytes for parameter in model.parameters() for part in parts_of(parameter))


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device(resolve().type)  # a plan holds for whichever card runs it
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or isinstance(device, bool) or found.type not in SLACK:
        raise InputError(f"device {shown(device)}: expected {' or '.join(sorted(SLACK))}")
    return found


def _check_arguments(batch_tokens, max_length, optimizer, memory, device, autocast) -> None:
    check_whole("plan: batch_tokens", batch_tokens)
    check_whole("plan: max_length", max_length)
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZER_BYTES:
        raise InputError(f"optimizer {shown(optimizer)}: expected {' or '.join(OPTIMIZER_BYTES)}")
    if not any(autocast is dtype for dtype in AUTOCAST):
        raise InputError(f"autocast {shown(autocast)}: expected {', '.join(map(str, AUTOCAST))}")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r}: there are {torch.cuda.device_count()} such; expected one of them")
    if device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
        if memory > total:
            raise InputError(
                f"memory {format_size(memory)}: the device has {format_size(total)}; expected at most that"
            )


@dataclass(frozen=True)
class Setting:
    """The levers that hold for all of a plan, as ``Plan`` names them; ``streamed`` counts layers from the front."""

    storage: str
    optimizer: str
    streamed: int
    chunk_bytes: int
    tables: str | None = None
    gradients: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", self.tables or self.storage)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What decides the bytes of a step beside its batch and its tiers."""
        return self.storage, self.tables, self.gradients


@dataclass(frozen=True)
class _Slopes:
    """Bytes of a batch: kept by a layer of each side, and what forward and backward need beside what layers keep."""

    encoder: float
    decoder: float
    forward: float
    backward: float


class Planner:
    def __init__(
        self, model, batch_tokens, max_length, optimizer, allow, device, autocast, tier=None, beam=1, graphs=False,
        packed=False,
    ):  # fmt: skip
        self.model, self.device, self.autocast, self.allow, self.beam = model, device, autocast, allow, beam
        self.tier, self.graphs, self.packed = tier, graphs, packed
        self.batch_tokens, self.longest = batch_tokens, min(max_length, batch_tokens)
        self.rows = max(1, batch_tokens // self.longest)  # of a whole update
        self.structure: Structure = describe(model)
        self.sides = [layer.side for layer in self.structure.layers]
        self.work: list[tuple[str, LayerWork]] = [
            (layer.side, layer_work(model, self.structure, layer)) for layer in self.structure.layers
        ]
        self.optimizer = optimizer
        self.weights = FrozenWeights(model, self.structure, device.type)
        frozen = (p.dtype for p in model.parameters() if p.dim() > 1 and not p.requires_grad)
        self.product: torch.dtype = autocast or next(frozen, torch.float32)
        self.rates: Rates = measure_rates(device, self.product)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if not self.trained:
            raise InputError(f"model {type(model).__name__}: trains nothing; expected one with an adapter (pk.adapt)")
        self._slopes: dict[tuple, _Slopes] = {}
        self._shallow: dict[tuple[tuple[int, int], str, str], nn.Module] = {}
        self.mode = simulate.fake_mode()
        self._counted: SearchBytes | None = None

    @property
    def tiers(self) -> Sequence[int]:
        """Those to choose from. The fifth moves activations to where a CPU has them anyway, and a graph cannot hold."""
        if self.tier is not None:
            return (self.tier,)
        return range(1, 6 if self.device.type == "cuda" and not self.graphs else 5)

    # ---- choosing

    def best(self, memory: int) -> Plan:
        for chunk_bytes in _chunks(memory):  # a smaller one only where nothing fits with a larger
            found = self._fastest(memory, chunk_bytes)
            if found is not None:
                break
        else:  # the search chooses by estimates, so that it may pass over what fits; the leanest plan decides
            if memory < self._least(self.allow):
                raise InputError(self._refusal(memory))
            _, setting, tiers = self._leanest(self.allow)
            found = self._plan(memory, setting, self.rows, tiers)
        return dataclasses.replace(found, more=self._more(found))

    def tiers_in_place(self, memory: int) -> tuple[tuple[int, ...], int]:
        """(tiers, loss chunk) for a batch as a whole, with weights stored and placed as they are."""
        for chunk_bytes in _chunks(memory):
            setting = next(self._settings(chunk_bytes, ()))
            tiers = self._tiers(self.rows, chunk_bytes, self._usable(memory) - self._always(setting))
            if tiers is not None:
                return tiers, chunk_bytes
        least = min(self._peak((tier,) * len(self.sides), self.rows, chunk_bytes) for tier in self.tiers)
        need = smallest_budget(self._always(setting) + least, self.device.type)
        raise InputError(
            f"tier 'auto': a batch of {self.batch_tokens:,} tokens needs {format_least(need)}, and there are "
            f"{format_below(memory, need)}; expected a smaller batch_tokens, or pk.plan, which has more levers"
        )

    def _fastest(self, memory: int, chunk_bytes: int) -> Plan | None:
        candidates = list(self._candidates(self._usable(memory), chunk_bytes))
        for _, *chosen in sorted(candidates, key=lambda candidate: self._price(*candidate[:2])):
            found = self._plan(memory, *chosen)
            if found.peak - self._context() <= self._usable(memory):  # candidates lie between measured batch sizes
                return found
        return None

    def _price(self, seconds: float, setting: Setting) -> float:
        """An approximation has to save a tenth of the time, streaming every layer a hundredth, or nothing else fits."""
        approximations = [
            setting.storage != "dense",
            setting.tables != "dense",
            setting.optimizer != self.optimizer,
            setting.gradients != "float32",
        ]
        return seconds * 1.1 ** sum(approximations) * (1 + 0.01 * setting.streamed / len(self.sides))

    def _candidates(self, usable: int, chunk_bytes: int) -> Iterator[tuple[float, Setting, int, tuple[int, ...]]]:
        """(seconds of an update, setting, micro-batches, tiers) of all that fit."""
        for setting in self._settings(chunk_bytes, self.allow):
            room = usable - self._always(setting)
            if room < self._step(setting):
                continue
            enough = 0
            for micro_batches in _divisions(self.rows):
                rows = -(-self.rows // micro_batches)
                tiers = self._tiers(rows, setting.chunk_bytes, room - self._graph_bytes(rows))
                if tiers is not None:
                    yield self._seconds(setting, micro_batches, rows, tiers), setting, micro_batches, tiers
                    enough += set(tiers) == {self.tiers[0]}
                    measured = rows == self.rows and setting.kind == EXACT
                    if enough == 2 or (enough and measured):
                        break  # smaller micro-batches only cost; one more, where the first was estimated too low

    def _settings(self, chunk_bytes: int, allow: tuple[str, ...]) -> Iterator[Setting]:
        storages = STORAGES if "quantized" in allow and self.weights.can_round else STORAGES[:1]
        optimizers = dict.fromkeys([self.optimizer, *(["adamw8bit"] if "8bit-optimizer" in allow else [])])
        wide = all(p.dtype == torch.float32 for p in self.trained)
        rounded = "bf16-gradients" in allow and wide and not self.graphs
        gradients = ["float32", *(["bfloat16"] if rounded else [])]
        layers = len(self.structure.layers)
        can_stream = self.weights.can_stream and not self.graphs
        streamed = [layers * share // 4 for share in range(5)] if can_stream else [0]
        levers = itertools.product(storages, storages, optimizers, gradients, dict.fromkeys(streamed))
        for storage, tables, optimizer, dtype, count in levers:
            if count and storage != "dense" and self.device.type == "cpu":
                continue  # they would have to be in memory once, to be rounded and written
            yield Setting(storage, optimizer, count, chunk_bytes, tables, dtype)

    def _tiers(self, rows: int, chunk_bytes: int, room: int) -> tuple[int, ...] | None:
        """A tier for each layer, the least work that fits into ``room``; layers at the front are made leaner first."""
        for tier in self.tiers:
            if self._peak((tier,) * len(self.sides), rows, chunk_bytes) <= room:
                break
        else:
            return None
        tiers = [tier] * len(self.sides)
        for i in reversed(range(len(tiers)) if tier > self.tiers[0] else ()):  # as many at the tier below as fit
            tiers[i] = tier - 1
            if self._peak(tuple(tiers), rows, chunk_bytes) > room:
                tiers[i] = tier
                break
        return tuple(tiers)

    def _seconds(self, setting: Setting, micro_batches: int, rows: int, tiers: tuple[int, ...]) -> float:
        batch = Batch(rows, self.longest, self.longest)
        host = 2 * sum(self.weights.layer_sizes(setting.storage, setting.streamed))
        host += sum(2 * self._input_bytes(rows) for tier in tiers if tier == 5)
        moved = self.weights.stored(setting.storage, setting.tables)
        # tiles of what is quantized are written and read once more in the dtype of products
        moved += 2 * self.weights.widened(setting.storage, setting.tables)
        return update_seconds(self.rates, self.work, tiers, self.weights.head, batch, micro_batches, moved, host)

    # ---- bytes

    def _usable(self, memory: int) -> int:
        return usable(memory, self.device.type)

    def _context(self) -> int:
        return _context(self.device.type)

    @functools.cache  # noqa: B019  a planner lives for one call of plan()
    def _always(self, setting: Setting) -> int:
        return sum(self._fixed(setting).values())

    def _graph_bytes(self, rows: int) -> int:
        return graph_bytes(rows * self.longest) if self.graphs else 0

    def _fixed(self, setting: Setting) -> dict[str, int]:
        aside = self._aside()
        return {
            **({"the model's own values": aside} if aside else {}),
            "frozen weights": self.weights.resident(setting.storage, setting.tables, setting.streamed),
            "trained parameters": sum(p.nbytes for p in self.trained),
            "their gradients": sum(map(GRADIENT_BYTES[setting.gradients], self.trained)),
            "optimiser state": sum(map(OPTIMIZER_BYTES[setting.optimizer], self.trained)),
        }

    def _aside(self) -> int:
        """Returns the bytes of what adapters that train the model's own tensors have set aside in host memory."""
        if self.device.type != "cpu":
            return 0
        return sum(kept.nbytes for record in records(self.model).values() for kept in record.base.values())

    @functools.cache  # noqa: B019
    def _step(self, setting: Setting) -> int:
        """What the optimiser's step adds at most: gradients that are widened for it, and its own scratch."""
        scratch = STEP_BYTES.get((setting.optimizer, self.device.type), lambda parameter: 0)
        if setting.gradients == "float32":
            return max(map(scratch, self.trained), default=0)
        return max((sum(4 * p.numel() for p in g) + max(map(scratch, g)) for g in groups(self.trained)), default=0)

    @functools.cache  # noqa: B019
    def _peak(self, tiers: tuple[int, ...], rows: int, chunk_bytes: int) -> float:
        """What forward and backward add at most, near enough to choose by."""
        return sum(self._kept_and_rest(tiers, {tier: self._between(tier, rows, chunk_bytes) for tier in set(tiers)}))

    def _kept_and_rest(self, tiers: tuple[int, ...], slopes: dict[int, _Slopes]) -> tuple[float, float]:
        """What layers keep, and what is there beside it at the worst moment.

        Leaner layers stand in front: when backward arrives there, those behind them keep nothing any more.
        """
        kept, most = 0.0, 0.0
        for side, tier in zip(self.sides, tiers, strict=True):
            kept += getattr(slopes[tier], side)
            most = max(most, kept + slopes[tier].backward)
        most = max(most, kept + max(slopes[tier].forward for tier in set(tiers)))
        kept = min(kept, most)  # the first layers may keep less than those that were counted
        return kept, most - kept

    @functools.cache  # noqa: B019
    def _between(self, tier: int, rows: int, chunk_bytes: int) -> _Slopes:
        """At ``rows``, on the line through two batch sizes that were measured: the next above and below."""
        few = -(-self.rows // 8)
        first, last = (1, few) if rows < few else (few, self.rows)
        if rows in (first, last):
            return self._measured(tier, rows, chunk_bytes)
        low, high = (self._measured(tier, anchor, chunk_bytes) for anchor in (first, last))
        share = (rows - first) / (last - first)
        values = zip(dataclasses.astuple(low), dataclasses.astuple(high), strict=True)
        return _Slopes(*(a + share * (b - a) for a, b in values))

    def _measured(self, tier: int, rows: int, chunk_bytes: int, kind: tuple[str, str, str] = EXACT) -> _Slopes:
        """kind: storage, tables and gradients; by default nothing is rounded."""
        key = tier, rows, chunk_bytes, kind
        if key not in self._slopes:
            self._slopes[key] = self._simulated(*key)
        return self._slopes[key]

    def _simulated(self, tier: int, rows: int, chunk_bytes: int, kind: tuple[str, str, str]) -> _Slopes:
        one, two, both = (self._phases(depth, tier, rows, chunk_bytes, *kind) for depth in ((1, 1), (2, 1), (2, 2)))
        encoder, decoder = two.kept - one.kept, both.kept - two.kept
        layers = 2 * (encoder + decoder)
        if tier == 5:  # the simulation runs on the CPU, where host memory is the device's
            encoder, decoder = (max(0, kept - self._input_bytes(rows)) for kept in (encoder, decoder))
        # the simulation counts what is read in host memory as kept; here it is on the device, with the next beside it
        forward, backward = (self._input_bytes(rows) * count if tier == 5 else 0 for count in (1, 2))
        return _Slopes(encoder, decoder, both.forward - layers + forward, both.backward - layers + backward)

    def _phases(
        self, depth: tuple[int, int], tier: int, rows: int, chunk_bytes: int, storage: str, tables: str, gradients: str
    ) -> Phases:
        with self.mode:
            key = depth, storage, tables
            if key not in self._shallow:
                self._shallow[key] = simulate.shallow(self.model, *depth, storage, tables)
            model = self._shallow[key]
            simulate.set_tiers(model, [tier] * sum(depth), self.device.type)
            model.petl_chunk_bytes = chunk_bytes
            batch = Batch(rows, self.longest, self.longest)
            return simulate.step(model, batch, self.autocast, gradients, self.packed, self.device.type)

    def _input_bytes(self, rows: int) -> int:
        itemsize = 2 if self.autocast is None and self.weights.dtype.itemsize == 2 else 4
        return rows * self.longest * self.structure.d_model * itemsize

    def parts(self, setting: Setting, rows: int, tiers: tuple[int, ...]) -> dict[str, int]:
        """Bytes by purpose at the worst moment of a step, which add up to its peak."""
        slopes = {tier: self._measured(tier, rows, setting.chunk_bytes, setting.kind) for tier in set(tiers)}
        kept, rest = self._kept_and_rest(tiers, slopes)
        moment = {"kept for backward": round(kept), "at the worst moment": round(rest)}
        if self._step(setting) > kept + rest:
            moment = {"kept for backward": 0, "in the optimiser's step": self._step(setting)}
        parts = self._fixed(setting) | moment
        beside = {"CUDA graphs": self._graph_bytes(rows), "CUDA context": self._context()}
        return parts | {name: size for name, size in beside.items() if size}

    # ---- telling

    def _plan(self, memory: int, setting: Setting, micro_batches: int, tiers: tuple[int, ...]) -> Plan:
        rows = -(-self.rows // micro_batches)
        parts = self.parts(setting, rows, tiers)
        # the memory of graphs is given back before an evaluation, but for cuBLAS' workspace
        search = self._search(self._usable(memory) - self._always(setting) - self._graph_bytes(0))
        return Plan(
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            memory=memory,
            device=str(self.device),
            precision=PRECISIONS[self.product],
            batch_tokens=self.batch_tokens,
            longest=self.longest,
            rows=rows,
            micro_tokens=rows * self.longest,
            micro_batches=micro_batches,
            tiers=tiers,
            chunk_bytes=setting.chunk_bytes,
            storage=setting.storage,
            optimizer=setting.optimizer,
            streamed=setting.streamed,
            evaluation_tokens=self._evaluation_tokens(search),
            peak=sum(parts.values()),
            parts=parts,
            seconds=self._seconds(setting, micro_batches, rows, tiers),
            rates_measured=self.rates.measured,
            approximations=approximations_of(setting),
            copies_hidden=self._copies_hide(setting, rows),
            tables=setting.tables,
            gradients=setting.gradients,
            cuda_graphs=self.graphs,
            search=search,
        )

    def _copies_hide(self, setting: Setting, rows: int) -> bool:
        dense = [self.weights.values(i) for i in range(setting.streamed)]
        return all(
            copies_hide(stored, rows * self.longest, 2 * values, self.rates.host, self.rates.products)
            for stored, values in zip(self.weights.layer_sizes(setting.storage, setting.streamed), dense, strict=True)
        )

    def _search(self, room: int) -> SearchBytes:
        if self._counted is None:
            self._counted = Search(self.model, self.beam, self.tiers[0], self.autocast).bytes(0, self.longest)
        return dataclasses.replace(self._counted, memory=room)

    def _evaluation_tokens(self, search: SearchBytes) -> int:
        """Source tokens times beam of a batch of the longest sentences; one sentence where not even that fits."""
        rows = max(1, search.rows(self.longest, output_length(self.longest, 2 * self.longest + 32)))
        return max(self.longest * self.beam, min(rows * self.longest * self.beam, self.batch_tokens))

    def _refusal(self, memory: int) -> str:
        allowed, any_ = self._least(self.allow), self._least(tuple(APPROXIMATIONS))
        shown_memory = format_below(memory, allowed)
        line = f"memory {shown_memory}: one sentence pair of {self.longest} tokens needs {format_least(allowed)}"
        if any_ < allowed:
            line += f", or {format_least(any_)} with --allow {','.join(APPROXIMATIONS)}"
        if self.graphs:
            plain = copy.copy(self)
            plain.graphs = False
            line += f", or {format_least(plain._least(self.allow))} without CUDA graphs"
        return f"{line}; expected at least that, or a shorter --max-length"

    def _least(self, allow: tuple[str, ...]) -> int:
        """The smallest budget that works."""
        return smallest_budget(self._leanest(allow)[0], self.device.type)

    @functools.cache  # noqa: B019
    def _leanest(self, allow: tuple[str, ...]) -> tuple[int, Setting, tuple[int, ...]]:
        """(peak without the context, setting, tiers) of the plan that takes least: one sentence pair at a time.

        Every way to round is counted with the highest tier; the best of them, and the one that rounds nothing, with the
        tiers that take least for it.
        """
        settings = sorted(self._settings(CHUNKS[-1], allow), key=self._always)
        found: tuple[int, Setting, tuple[int, ...]] | None = None
        for setting in settings:
            if found is not None and self._always(setting) >= found[0]:
                break
            found = self._leaner(found, setting, (self.tiers[-1],) * len(self.sides))
        kinds = {EXACT, found[1].kind}
        for setting in settings:
            if setting.kind in kinds and self._always(setting) < found[0]:
                found = self._leaner(found, setting, self._lean_tiers(setting.kind))
        return found

    def _leaner(self, found, setting: Setting, tiers: tuple[int, ...]) -> tuple[int, Setting, tuple[int, ...]]:
        """``found`` of ``_leanest``, or the given plan, where that takes less."""
        peak = sum(self.parts(setting, 1, tiers).values()) - self._context()
        return found if found is not None and found[0] <= peak else (peak, setting, tiers)

    @functools.cache  # noqa: B019
    def _lean_tiers(self, kind: tuple[str, str, str]) -> tuple[int, ...]:
        """Those with which one sentence pair takes least: leaner ones in front, of two that follow each other.

        Where something is rounded, of the two that take least where nothing is.
        """
        used = self.tiers if kind == EXACT else sorted(set(self._lean_tiers(EXACT)))
        slopes = {tier: self._measured(tier, 1, CHUNKS[-1], kind) for tier in used}
        mixtures = []
        for tier in used:
            for leaner in range(len(self.sides) + 1 if tier + 1 in used else 1):
                mixtures.append((tier + 1,) * leaner + (tier,) * (len(self.sides) - leaner))
        return min(mixtures, key=lambda tiers: sum(self._kept_and_rest(tiers, slopes)))

    def _more(self, plan: Plan) -> tuple[tuple[int, float, str], ...]:
        """What each further GiB would buy, until nothing more."""
        found, seconds = [], plan.seconds
        for extra in (1, 2, 4, 8):
            better = self._fastest(plan.memory + extra * GIB, plan.chunk_bytes)
            if better is not None and better.seconds < 0.98 * seconds:
                found.append((better.memory, better.seconds, levers(better)))
                seconds = better.seconds
        return tuple(found)


@dataclass(frozen=True)
class SearchPlan:
    """How a trained model translates inside a budget: what ``load_planned`` reads, and what batches may take."""

    storage: str
    tables: str
    streamed: int
    device: str
    search: SearchBytes


def plan_search(
    model: nn.Module,
    memory: int,
    storages: tuple[str, str],
    beam: int,
    longest: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    refuse: bool = True,
) -> SearchPlan:
    """The fewest streamed layers with which beam search of ``model``, possibly on the meta device, fits ``memory``.

    storages: of the frozen weights, in layers and in tables. longest: tokens of the longest sentence and of the
    longest translation. Where one such sentence does not fit: InputError, with the least that works, or if not
    ``refuse`` the leanest way, in which shorter ones may.
    """
    weights, count = FrozenWeights(model, describe(model), device.type), len(describe(model).layers)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    search = Search(model, beam, 1, autocast).bytes(0, longest)
    one = search.always + search.of(longest, output_length(longest, longest))
    can_stream = weights.can_stream and (storages[0] == "dense" or device.type == "cuda")
    needs = []
    for streamed in dict.fromkeys(count * share // 4 for share in range(5)) if can_stream else (0,):
        always = weights.resident(*storages, streamed) + trained
        room = usable(memory, device.type) - always
        if room >= one:
            return SearchPlan(*storages, streamed, device.type, dataclasses.replace(search, memory=room))
        needs.append(smallest_budget(always + one, device.type))
        leanest = SearchPlan(*storages, streamed, device.type, dataclasses.replace(search, memory=room))
    if not refuse:
        return leanest
    least = min(needs)
    raise InputError(
        f"memory {format_below(memory, least)}: to translate one sentence of {longest} tokens with {beam} beams needs "
        f"{format_least(least)}; expected at least that, or a smaller --beam or --max-length"
    )


def usable(memory: int, device: str) -> int:
    """What a budget leaves for weights and for a step: without slack, and on CUDA without the context."""
    return int(memory * (1 - SLACK[device])) - _context(device)


def smallest_budget(need: float, device: str) -> int:
    """The smallest budget of which ``usable`` leaves ``need`` bytes."""
    budget = math.ceil((need + _context(device)) / (1 - SLACK[device]))
    while usable(budget, device) < need:
        budget += 1
    while usable(budget - 1, device) >= need:
        budget -= 1
    return budget


def _context(device: str) -> int:
    return CONTEXT if device == "cuda" else 0


def _chunks(memory: int) -> Sequence[int]:
    return [chunk for chunk in CHUNKS if chunk <= memory // 16] or CHUNKS[-1:]


def _divisions(rows: int) -> list[int]:
    """Into how many micro-batches ``rows`` are worth splitting: one number for each size of the parts."""
    sizes = sorted({-(-rows // n) for n in range(1, rows + 1)}, reverse=True)
    return [-(-rows // size) for size in sizes]
