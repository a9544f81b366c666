"""The choice of a candidate: the fastest that fits a budget, or the one that takes least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

from petl_kernels.errors import InputError
from petl_kernels.planning.budget import smallest_budget
from petl_kernels.planning.figures import Figures
from petl_kernels.planning.host import no_room_on_host
from petl_kernels.planning.levers import CHUNKS, EXACT, Candidate, Levers, Rounding, chunks_within, divisions
from petl_kernels.planning.plan import APPROXIMATIONS, Plan, host_peak, levers_text
from petl_kernels.units import format_below, format_least

GIB = 2**30
FURTHER = (1, 2, 4, 8)  # GiB beyond the budget, whose gain in time a plan shows
WORTH = 0.98  # a further GiB is shown where an update then takes less than this share of the time
APPROXIMATION_PRICE = 1.1  # each approximation has to save a tenth of the time, or nothing else fits
STREAMING_PRICE = 0.01  # streaming every layer has to save a hundredth


class Leanest(NamedTuple):
    """The candidate of one sentence pair at a time that takes least. peak: in bytes, without CUDA's context."""

    peak: int
    levers: Levers
    tiers: tuple[int, ...]


class Chooser:
    """Chooses among the candidates whose ``figures`` are given. Estimates order them; counts decide."""

    def __init__(self, figures: Figures):
        self.figures, self.request = figures, figures.request
        self.layers, self.kind = figures.layers, figures.kind
        self.leanest = functools.cache(self._leanest)
        self._leanest_tiers = functools.cache(self._count_leanest_tiers)

    def best(self, memory: int) -> Plan:
        """Returns the plan of ``within``, with what larger budgets would buy. Raises InputError as it does."""
        found = self.within(memory)
        return dataclasses.replace(found, more=self.more(found))

    def within(self, memory: int) -> Plan:
        """Returns the fastest plan inside ``memory`` bytes. Raises InputError, with the least that works."""
        for chunk_bytes in chunks_within(memory):  # a smaller one only where nothing fits with a larger
            found = self.fastest(memory, chunk_bytes)
            if found is not None:
                return found
        # candidates are found by estimates, so that one that fits may be missed; the leanest one decides
        if memory < self.least(self.request.allow):
            raise InputError(self._refusal(memory))
        _, levers, tiers = self.leanest(self.request.allow)
        return self.figures.plan(memory, Candidate(levers, self.request.pairs, tiers))

    def tiers_in_place(self, memory: int) -> tuple[tuple[int, ...], int]:
        """Returns (tiers, loss chunk) for a batch as a whole, with weights stored and placed as they are.

        Raises InputError, with the least that works.
        """
        chunks = chunks_within(memory)
        for chunk_bytes in chunks:
            levers = next(self.figures.choices(chunk_bytes, ()))
            room = self.figures.usable(memory) - self.figures.always(levers)
            tiers = self._tiers_within(self.request.pairs, chunk_bytes, room)
            if tiers is not None:
                return tiers, chunk_bytes
        levers = next(self.figures.choices(chunks[-1], ()))
        peaks = (self._estimated_peak((tier,) * self.layers, chunks[-1]) for tier in self.request.tiers)
        need = smallest_budget(self.figures.always(levers) + min(peaks), self.kind)
        raise InputError(
            f"tier 'auto': a batch of {self.request.batch_tokens:,} tokens needs {format_least(need)}, and there are "
            f"{format_below(memory, need)}; expected a smaller batch_tokens, or pk.plan, which has more levers"
        )

    def _estimated_peak(self, tiers: tuple[int, ...], chunk_bytes: int) -> float:
        return self.figures.step.estimated_peak(tiers, self.request.pairs, chunk_bytes)

    # ---- the fastest

    def fastest(self, memory: int, chunk_bytes: int) -> Plan | None:
        """Returns the fastest plan of those that the estimates admit, or None where no candidate fits."""
        usable = self.figures.usable(memory)
        for _, candidate in sorted(self._candidates(usable, chunk_bytes), key=lambda found: found[0]):
            plan = self.figures.plan(memory, candidate)
            if plan.peak - self.figures.context <= usable:  # estimates lie between counted numbers of pairs
                return plan
        return None

    def _candidates(self, usable: int, chunk_bytes: int) -> Iterator[tuple[float, Candidate]]:
        """Yields (price, candidate) of all that fit by the estimates."""
        for levers in self.figures.choices(chunk_bytes, self.request.allow):
            room = usable - self.figures.always(levers)
            if room < self.figures.optimizer_step(levers):
                continue
            yield from self._candidates_with(levers, room)

    def _candidates_with(self, levers: Levers, room: int) -> Iterator[tuple[float, Candidate]]:
        with_least_work = 0
        for micro_batches in divisions(self.request.pairs):
            pairs = self.figures.pairs_of(micro_batches)
            tiers = self._tiers_within(pairs, levers.chunk_bytes, room - self.figures.graphs(pairs))
            if tiers is None:
                continue
            if not self.figures.fits_host(levers, pairs, tiers):
                continue
            candidate = Candidate(levers, micro_batches, tiers)
            yield self.price(self.figures.seconds(candidate), levers), candidate
            with_least_work += set(tiers) == {self.request.tiers[0]}
            counted = pairs == self.request.pairs and levers.rounding == EXACT
            if with_least_work == 2 or (with_least_work and counted):
                break  # smaller micro-batches only cost; one more, where the first was estimated too low

    def price(self, seconds: float, levers: Levers) -> float:
        """Returns ``seconds`` with what approximations and streaming have to save to be worth it."""
        approximations = [
            levers.storage != "dense",
            levers.tables != "dense",
            levers.optimizer != self.request.optimizer,
            levers.gradients != "float32",
        ]
        streaming = 1 + STREAMING_PRICE * levers.streamed / self.layers
        return seconds * APPROXIMATION_PRICE ** sum(approximations) * streaming

    def _tiers_within(self, pairs: int, chunk_bytes: int, room: int) -> tuple[int, ...] | None:
        """Returns a tier for each layer, the least work that fits into ``room``; layers in front are leaner."""

        def fits(tiers: tuple[int, ...]) -> bool:
            return self.figures.step.estimated_peak(tiers, pairs, chunk_bytes) <= room

        tier = next((tier for tier in self.request.tiers if fits((tier,) * self.layers)), None)
        if tier is None:
            return None
        tiers = [tier] * self.layers
        for i in reversed(range(self.layers) if tier > self.request.tiers[0] else ()):  # the tier below, from behind
            tiers[i] = tier - 1
            if not fits(tuple(tiers)):
                tiers[i] = tier
                break
        return tuple(tiers)

    # ---- the leanest

    def least(self, allow: tuple[str, ...]) -> int:
        """Returns the smallest budget that works with the approximations of ``allow``."""
        return smallest_budget(self.leanest(allow).peak, self.kind)

    def _leanest(self, allow: tuple[str, ...]) -> Leanest:
        """Returns the candidate that takes least of those that the host has room for, for one sentence pair at a time.

        Every way to round is counted with the highest tier; the best of them, and the one that rounds nothing, with the
        tiers that take least for it.
        """
        highest = (self.request.tiers[-1],) * self.layers
        ordered = sorted(self._choices_on_host(allow, highest), key=self.figures.always)
        found = self._with_peak(ordered[0], highest)
        for levers in ordered[1:]:
            if self.figures.always(levers) >= found.peak:
                break
            found = min(found, self._with_peak(levers, highest), key=lambda each: each.peak)
        roundings = {EXACT, found.levers.rounding}
        for levers in ordered:
            if levers.rounding in roundings and self.figures.always(levers) < found.peak:
                leaner = self._with_peak(levers, self._leanest_tiers(levers.rounding))
                found = min(found, leaner, key=lambda each: each.peak)
        return found

    def _choices_on_host(self, allow: tuple[str, ...], tiers: tuple[int, ...]) -> list[Levers]:
        """Returns the levers that the host has room for. Raises InputError, with the least that works, without any."""
        choices = list(self.figures.choices(CHUNKS[-1], allow))
        found = [levers for levers in choices if self.figures.fits_host(levers, 1, tiers)]
        if not found:
            least = min(host_peak(self.figures.on_host(levers, 1, tiers)) for levers in choices)
            raise no_room_on_host(self.request.host or 0, least)
        return found

    def _with_peak(self, levers: Levers, tiers: tuple[int, ...]) -> Leanest:
        return Leanest(sum(self.figures.by_purpose(levers, 1, tiers).values()) - self.figures.context, levers, tiers)

    def _count_leanest_tiers(self, rounding: Rounding) -> tuple[int, ...]:
        """Returns the tiers with which one sentence pair takes least: leaner ones in front, of two neighbours.

        Where something is rounded, only the two that take least where nothing is are counted.
        """
        used = self.request.tiers if rounding == EXACT else sorted(set(self._leanest_tiers(EXACT)))
        slopes = {tier: self.figures.step.counted(tier, 1, CHUNKS[-1], rounding) for tier in used}
        mixtures: list[tuple[int, ...]] = []
        for tier in used:
            for leaner in range(self.layers + 1 if tier + 1 in used else 1):
                mixtures.append((tier + 1,) * leaner + (tier,) * (self.layers - leaner))
        return min(mixtures, key=lambda tiers: sum(self.figures.step.mixed(tiers, slopes)))

    # ---- larger and smaller budgets

    def more(self, plan: Plan) -> tuple[tuple[int, float, str], ...]:
        """Returns (budget, seconds, levers) of what each further GiB would buy, until nothing more."""
        found: list[tuple[int, float, str]] = []
        seconds = plan.seconds
        for extra in FURTHER:
            better = self.fastest(plan.memory + extra * GIB, plan.chunk_bytes)
            if better is not None and better.seconds < WORTH * seconds:
                found.append((better.memory, better.seconds, levers_text(better)))
                seconds = better.seconds
        return tuple(found)

    def _refusal(self, memory: int) -> str:
        request = self.request
        allowed, with_any = self.least(request.allow), self.least(tuple(APPROXIMATIONS))
        line = f"memory {format_below(memory, allowed)}: one sentence pair of {request.longest} tokens needs "
        line += format_least(allowed)
        if with_any < allowed:
            line += f", or {format_least(with_any)} with --allow {','.join(APPROXIMATIONS)}"
        if request.graphs:
            without = Chooser(self.figures.without_graphs()).least(request.allow)
            line += f", or {format_least(without)} without CUDA graphs"
        return f"{line}; expected at least that, or a shorter --max-length"
