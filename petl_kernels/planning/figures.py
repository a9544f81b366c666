"""The figures of a candidate: its bytes by purpose and its seconds.

Bytes by purpose are those of the worst moment of a step, and add up to its peak:

    peak = weights by storage + trained + gradients + optimiser state              always there
         + Σ_layers kept(tier, pairs) + the most that forward, loss or backward add   ``step_bytes``
           or, if more, the bytes that the optimiser's step adds: layers keep nothing then
         + slack, and on CUDA the context
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from petl_kernels.models.structure import describe
from petl_kernels.planning import budget
from petl_kernels.planning.beam_search import Search, SearchBytes, output_length
from petl_kernels.planning.cost import Rates, Traffic, model_work, update_seconds
from petl_kernels.planning.host import on_host, own_values
from petl_kernels.planning.levers import STORAGES, Candidate, Levers, Request, streamed_layers
from petl_kernels.planning.plan import PRECISIONS, Plan, approximations_of, host_peak
from petl_kernels.planning.resident import GRADIENT_BYTES, OPTIMIZER_BYTES, STEP_BYTES, FrozenWeights
from petl_kernels.planning.simulate import Batch
from petl_kernels.planning.step_bytes import StepBytes
from petl_kernels.step.gradients import groups
from petl_kernels.step.graphs import graph_bytes
from petl_kernels.weights.streamed import copies_hide


def product_dtype(model: nn.Module, autocast: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of matrix products: autocast's, or that of the first frozen matrix."""
    frozen = (p.dtype for p in model.parameters() if p.dim() > 1 and not p.requires_grad)
    return autocast or next(frozen, torch.float32)


def _no_bytes(parameter: Tensor) -> int:
    """Counts nothing: of optimisers without temporaries."""
    return 0


class Figures:
    """Bytes and seconds of the ways to train ``model``, adapted and possibly on the meta device."""

    def __init__(self, model: nn.Module, request: Request, rates: Rates, step: StepBytes | None = None):
        """step: counts of the same training that were made already."""
        structure = describe(model)
        self.model, self.request, self.rates = model, request, rates
        self.kind = request.device.type
        self.layers = len(structure.layers)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.weights = FrozenWeights(model, structure, self.kind)
        self.work = model_work(model, structure)
        self.step = step or StepBytes(model, structure, request, self.weights.dtype)
        self.always = functools.cache(self._always)
        self.optimizer_step = functools.cache(self._optimizer_step)
        self._search_bytes = functools.cache(self._count_search)

    def without_graphs(self) -> Figures:
        """Returns the figures of the same training without CUDA graphs."""
        return Figures(self.model, dataclasses.replace(self.request, graphs=False), self.rates, self.step)

    def on(self, rates: Rates, graphs: bool) -> Figures:
        """Returns the figures of the same training on a card of these rates, by the counts that are made already."""
        found = copy.copy(self)
        found.rates, found.request = rates, dataclasses.replace(self.request, graphs=graphs)
        return found

    def choices(self, chunk_bytes: int, allow: Sequence[str]) -> Iterator[Levers]:
        """Yields all levers that may be used with the approximations of ``allow``, the exact ones first."""
        may_round = STORAGES if "quantized" in allow and self.weights.can_round else STORAGES[:1]
        in_layers, in_tables = (may_round if there == "dense" else (there,) for there in self.weights.storages)
        optimizers: dict[str, None] = dict.fromkeys(
            [self.request.optimizer, *(["adamw8bit"] if "8bit-optimizer" in allow else [])]
        )
        wide = all(p.dtype == torch.float32 for p in self.trained)
        narrow = "bf16-gradients" in allow and wide and not self.request.graphs
        gradients = ["float32", *(["bfloat16"] if narrow else [])]
        can_stream = self.weights.can_stream and not self.request.graphs
        streamed = streamed_layers(self.layers) if can_stream else [0]
        for storage, tables, optimizer, dtype, count in product(in_layers, in_tables, optimizers, gradients, streamed):
            if count and storage != "dense" and self.kind == "cpu":
                continue  # they would have to be in memory once, to be rounded and written
            yield Levers(storage, optimizer, count, chunk_bytes, tables, dtype)

    def pairs_of(self, micro_batches: int) -> int:
        """Returns the sentence pairs of the largest of so many micro-batches."""
        return -(-self.request.pairs // micro_batches)

    # ---- bytes

    def usable(self, memory: int) -> int:
        return budget.usable(memory, self.kind)

    @property
    def context(self) -> int:
        return budget.context_bytes(self.kind)

    def graphs(self, pairs: int) -> int:
        """Returns the bytes of CUDA graphs beside the step; 0 pairs leave cuBLAS' workspace."""
        return graph_bytes(pairs * self.request.longest) if self.request.graphs else 0

    def by_purpose(self, levers: Levers, pairs: int, tiers: tuple[int, ...]) -> dict[str, int]:
        """Returns the bytes by purpose at the worst moment of a step; they add up to its peak."""
        found = self.always_by_purpose(levers) | self._worst_moment(levers, pairs, tiers)
        beside = {"CUDA graphs": self.graphs(pairs), "CUDA context": self.context}
        return found | {name: size for name, size in beside.items() if size}

    def _worst_moment(self, levers: Levers, pairs: int, tiers: tuple[int, ...]) -> dict[str, int]:
        kept, working = self.step.worst_moment(tiers, pairs, levers.chunk_bytes, levers.rounding)
        if self.optimizer_step(levers) > kept + working:
            return {"kept for backward": 0, "in the optimiser's step": self.optimizer_step(levers)}
        return {"kept for backward": round(kept), "at the worst moment": round(working)}

    def _always(self, levers: Levers) -> int:
        return sum(self.always_by_purpose(levers).values())

    def always_by_purpose(self, levers: Levers) -> dict[str, int]:
        on_cpu = {"the model's own values": own_values(self.model), "text": self.request.host_data}
        return {
            **{name: size for name, size in on_cpu.items() if size and self.kind == "cpu"},
            "frozen weights": self.weights.resident(levers.storage, levers.tables, levers.streamed),
            "trained parameters": sum(p.nbytes for p in self.trained),
            "their gradients": sum(map(GRADIENT_BYTES[levers.gradients], self.trained)),
            "optimiser state": sum(map(OPTIMIZER_BYTES[levers.optimizer], self.trained)),
        }

    def on_host(self, levers: Levers, pairs: int, tiers: tuple[int, ...]) -> dict[str, int]:
        """Returns the bytes of host memory beside a CUDA device, as ``on_host`` does; none on a CPU."""
        if self.kind == "cpu":
            return {}
        beside = tiers.count(5) * self.step.input_bytes(pairs), self.request.host_data
        return on_host(self.model, self.weights, levers.storage, levers.tables, levers.streamed, *beside)

    def fits_host(self, levers: Levers, pairs: int, tiers: tuple[int, ...]) -> bool:
        """Returns whether the host has room; where nothing limits it, it has."""
        return self.request.host is None or host_peak(self.on_host(levers, pairs, tiers)) <= self.request.host

    def _optimizer_step(self, levers: Levers) -> int:
        """Returns the most that the optimiser's step adds: gradients that are widened for it, and its own scratch."""
        scratch = STEP_BYTES.get((levers.optimizer, self.kind), _no_bytes)
        if levers.gradients == "float32":
            return max(map(scratch, self.trained), default=0)
        return max((sum(4 * p.numel() for p in g) + max(map(scratch, g)) for g in groups(self.trained)), default=0)

    # ---- seconds

    def seconds(self, candidate: Candidate) -> float:
        """Returns the seconds of an update."""
        levers, pairs = candidate.levers, self.pairs_of(candidate.micro_batches)
        host = 2 * sum(self.weights.layer_sizes(levers.storage, levers.streamed))
        host += sum(2 * self.step.input_bytes(pairs) for tier in candidate.tiers if tier == 5)
        moved = self.weights.stored(levers.storage, levers.tables)
        # tiles of what is quantized are written and read once more in the dtype of products
        moved += 2 * self.weights.widened(levers.storage, levers.tables)
        batch = Batch(pairs, self.request.longest, self.request.longest)
        traffic = Traffic(moved, host)
        return update_seconds(self.rates, self.work, candidate.tiers, batch, candidate.micro_batches, traffic)

    def copies_hide(self, levers: Levers, pairs: int) -> bool:
        """Returns whether the copy of a streamed layer takes no longer than the matrix work of another."""
        dense = [self.weights.values(i) for i in range(levers.streamed)]
        return all(
            copies_hide(stored, pairs * self.request.longest, 2 * values, self.rates.host, self.rates.products)
            for stored, values in zip(self.weights.layer_sizes(levers.storage, levers.streamed), dense, strict=True)
        )

    # ---- a plan of them

    def plan(self, memory: int, candidate: Candidate) -> Plan:
        """Returns ``candidate`` as a plan for a budget of ``memory`` bytes."""
        levers, pairs = candidate.levers, self.pairs_of(candidate.micro_batches)
        parts = self.by_purpose(levers, pairs, candidate.tiers)
        # the memory of graphs is given back before an evaluation, but for cuBLAS' workspace
        room = self.usable(memory) - self.always(levers) - self.graphs(0)
        search = self.search(room) if self.request.beam else None
        return Plan(
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            memory=memory,
            device=str(self.request.device),
            precision=PRECISIONS[product_dtype(self.model, self.request.autocast)],
            batch_tokens=self.request.batch_tokens,
            longest=self.request.longest,
            rows=pairs,
            micro_tokens=pairs * self.request.longest,
            micro_batches=candidate.micro_batches,
            tiers=candidate.tiers,
            chunk_bytes=levers.chunk_bytes,
            storage=levers.storage,
            optimizer=levers.optimizer,
            streamed=levers.streamed,
            evaluation_tokens=self.request.longest if search is None else self._evaluation_tokens(search),
            peak=sum(parts.values()),
            parts=parts,
            seconds=self.seconds(candidate),
            rates_measured=self.rates.measured,
            approximations=approximations_of(levers),
            copies_hidden=self.copies_hide(levers, pairs),
            tables=levers.tables,
            gradients=levers.gradients,
            cuda_graphs=self.request.graphs,
            search=search,
            host=self.on_host(levers, pairs, candidate.tiers),
            host_memory=self.request.host,
            input_bytes=self.step.input_bytes(1),
        )

    def search(self, room: int) -> SearchBytes:
        """Returns what beam search takes, and ``room`` as the bytes that it may take."""
        return dataclasses.replace(self._search_bytes(), memory=room)

    def _count_search(self) -> SearchBytes:
        request = self.request
        return Search(self.model, request.beam, request.tiers[0], request.autocast).bytes(0, request.longest)

    def _evaluation_tokens(self, search: SearchBytes) -> int:
        """Returns the source tokens times beams of a batch of the longest sentences, of one sentence at least."""
        longest, beam = self.request.longest, self.request.beam
        sentences = max(1, search.rows(longest, output_length(longest, 2 * longest + 32)))
        return max(longest * beam, min(sentences * longest * beam, self.request.batch_tokens))
