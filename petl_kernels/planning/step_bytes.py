"""Bytes that forward and backward of a micro-batch add to those that are always there.

Bytes are counted by simulating the step at depths of one and two layers a side: they are exactly affine in the number
of layers of a kind. Between two numbers of pairs that were counted a line is near enough to choose by.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from petl_kernels.models.structure import Structure
from petl_kernels.planning import simulate
from petl_kernels.planning.levers import EXACT, Request, Rounding
from petl_kernels.planning.simulate import Batch, Phases


@dataclass(frozen=True)
class Slopes:
    """Bytes of a micro-batch at one tier.

    encoder, decoder: kept by a layer of that side. forward, backward: the most beside what layers keep.
    """

    encoder: float
    decoder: float
    forward: float
    backward: float


class Moment(NamedTuple):
    """The worst moment of forward and backward: bytes that layers keep then, and those beside them."""

    kept: float
    working: float


class StepBytes:
    """Counts the steps of ``model``, which may be on the meta device; each is simulated once."""

    def __init__(self, model: nn.Module, structure: Structure, request: Request, frozen_dtype: torch.dtype):
        """frozen_dtype: that of most frozen weights, which is the dtype of activations without autocast."""
        self.model, self.request = model, request
        self.sides = [layer.side for layer in structure.layers]
        narrow = request.autocast is None and frozen_dtype.itemsize == 2
        self._row_bytes = request.longest * structure.d_model * (2 if narrow else 4)
        self._shallow: dict[tuple[tuple[int, int], str, str], Any] = {}
        self._mode = simulate.fake_mode()
        self.counted = functools.cache(self._counted)
        self.between = functools.cache(self._between)
        self.estimated_peak = functools.cache(self._estimated_peak)

    def worst_moment(self, tiers: tuple[int, ...], pairs: int, chunk_bytes: int, rounding: Rounding) -> Moment:
        """Returns the worst moment by the counts of exactly this micro-batch. tiers: one a layer, encoder first."""
        return self.mixed(tiers, {tier: self.counted(tier, pairs, chunk_bytes, rounding) for tier in set(tiers)})

    def _estimated_peak(self, tiers: tuple[int, ...], pairs: int, chunk_bytes: int) -> float:
        """Returns the bytes of the worst moment where nothing is rounded, near enough to choose by."""
        return sum(self.mixed(tiers, {tier: self.between(tier, pairs, chunk_bytes) for tier in set(tiers)}))

    def mixed(self, tiers: tuple[int, ...], slopes: Mapping[int, Slopes]) -> Moment:
        """Returns the worst moment of layers at ``tiers``.

        Leaner layers stand in front: when backward arrives there, those behind them keep nothing any more.
        """
        kept, most = 0.0, 0.0
        for side, tier in zip(self.sides, tiers, strict=True):
            kept += getattr(slopes[tier], side)
            most = max(most, kept + slopes[tier].backward)
        most = max(most, kept + max(slopes[tier].forward for tier in set(tiers)))
        kept = min(kept, most)  # the first layers may keep less than those that were counted
        return Moment(kept, most - kept)

    def _between(self, tier: int, pairs: int, chunk_bytes: int) -> Slopes:
        """Returns the point for ``pairs`` on the line through the counted numbers of pairs below and above."""
        few = -(-self.request.pairs // 8)
        first, last = (1, few) if pairs < few else (few, self.request.pairs)
        if pairs in (first, last):
            return self.counted(tier, pairs, chunk_bytes, EXACT)
        low, high = (self.counted(tier, end, chunk_bytes, EXACT) for end in (first, last))
        share = (pairs - first) / (last - first)
        values = zip(dataclasses.astuple(low), dataclasses.astuple(high), strict=True)
        return Slopes(*(a + share * (b - a) for a, b in values))

    def _counted(self, tier: int, pairs: int, chunk_bytes: int, rounding: Rounding) -> Slopes:
        one, two = (self.kept(depth, tier, pairs, chunk_bytes, *rounding[:2]) for depth in ((1, 1), (2, 1)))
        both = self.phases((2, 2), tier, pairs, chunk_bytes, rounding)
        encoder, decoder = two - one, both.kept - two
        layers = 2 * (encoder + decoder)
        if tier == 5:  # the simulation runs on the CPU, where host memory is the device's
            encoder, decoder = (max(0, kept - self.input_bytes(pairs)) for kept in (encoder, decoder))
        # the simulation counts inputs in host memory as kept; here one is on the device, in backward with the next
        forward, backward = (self.input_bytes(pairs) * count if tier == 5 else 0 for count in (1, 2))
        return Slopes(encoder, decoder, both.forward - layers + forward, both.backward - layers + backward)

    def phases(self, depth: tuple[int, int], tier: int, pairs: int, chunk_bytes: int, rounding: Rounding) -> Phases:
        """Returns what a simulated step of a model of ``depth`` (encoder, decoder) layers takes."""
        storage, tables, gradients = rounding
        with self._mode:
            model, given = self._simulated(depth, tier, pairs, chunk_bytes, storage, tables)
            return simulate.step(model, **given, gradients=gradients)

    def kept(self, depth: tuple[int, int], tier: int, pairs: int, chunk_bytes: int, storage: str, tables: str) -> int:
        """Returns the bytes that such a model keeps between forward and backward."""
        with self._mode:
            model, given = self._simulated(depth, tier, pairs, chunk_bytes, storage, tables)
            return simulate.kept(model, **given)

    def _simulated(
        self, depth: tuple[int, int], tier: int, pairs: int, chunk_bytes: int, storage: str, tables: str
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Returns a model of ``depth`` layers with all of them at ``tier``, and what its step is simulated with."""
        request, kind = self.request, self.request.device.type
        key = depth, storage, tables
        if key not in self._shallow:
            self._shallow[key] = simulate.shallow(self.model, *depth, storage, tables)
        model = self._shallow[key]
        simulate.set_tiers(model, [tier] * sum(depth), kind)
        model.petl_chunk_bytes = chunk_bytes
        batch = Batch(pairs, request.longest, request.longest)
        return model, {"batch": batch, "autocast": request.autocast, "packed": request.packed, "device": kind}

    def input_bytes(self, pairs: int) -> int:
        """Returns the bytes of a layer's input."""
        return pairs * self._row_bytes
