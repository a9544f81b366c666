"""Every budget above one that fits, fits; and a refusal names the smallest that does."""

from __future__ import annotations

import gc
import itertools
import re
import weakref

import numpy as np
import pytest
import torch
from methods.models import build

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.planning import chooser as choosing
from petl_kernels.planning import planner as planning
from petl_kernels.planning.beam_search import SearchBytes
from petl_kernels.planning.budget import smallest_budget, usable
from petl_kernels.planning.chooser import Chooser
from petl_kernels.planning.cost import ASSUMED
from petl_kernels.planning.figures import Figures
from petl_kernels.planning.levers import CHUNKS, EXACT, Request, Rounding
from petl_kernels.planning.plan import APPROXIMATIONS
from petl_kernels.planning.planner import plan_search
from petl_kernels.planning.step_bytes import Slopes, StepBytes
from petl_kernels.units import format_below, format_least, format_size, parse_size

METHODS = {
    "LoRA": ("m2m100", pk.LoRA(rank=4)),
    "adapters": ("bart", pk.Adapter(bottleneck=16)),
    "all biases": ("marian", pk.BitFit()),
}
MIB = 2**20


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Uses assumed rates, counts no search, and leaves out what larger budgets would bring."""
    monkeypatch.setattr(planning, "measure_rates", lambda *_: ASSUMED)
    monkeypatch.setattr(Figures, "search", lambda self, room: SearchBytes(room, 0.0, 1e3, 10.0, 10.0))
    monkeypatch.setattr(Chooser, "more", lambda *_: ())


def invented(seed: int):
    """Returns bytes of a step that no model has: more pairs take more, by a line that bends; leaner tiers keep less and
    work with more; rounding needs room of its own."""
    draw = np.random.default_rng(seed)
    kept, work = np.cumsum(draw.uniform(0.1, 3, 6))[::-1] * 1e5, np.cumsum(draw.uniform(0, 4, 6)) * 1e5
    bend, first = draw.uniform(0.6, 1.4), draw.uniform(0, 1e6)
    room = dict(zip(("dense", "int8", "nf4"), (0.0, *draw.uniform(0, 1e6, 2)), strict=True))

    def slopes(self, tier: int, pairs: int, chunk_bytes: int, rounding: Rounding) -> Slopes:
        size = pairs**bend
        beside = first + chunk_bytes / 8 + room[rounding[0]] + room[rounding[1]] + work[tier] * size
        return Slopes(kept[tier] * size, 1.3 * kept[tier] * size, beside, 1.5 * beside)

    return slopes


def chooser_for(model, *training, **options) -> Chooser:
    return Chooser(Figures(model, Request(*training, **options), ASSUMED))


def fits(chooser: Chooser, memory: int) -> bool:
    try:
        found = chooser.best(memory)
    except InputError:
        return False
    assert sum(found.parts.values()) == found.peak <= memory
    return True


@pytest.mark.parametrize(
    ("method", "device"),
    [
        *(("LoRA", "cuda"), ("adapters", "cpu")),
        *(
            pytest.param(*pair, marks=pytest.mark.repeat)
            for pair in (("LoRA", "cpu"), ("adapters", "cuda"), ("all biases", "cpu"), ("all biases", "cuda"))
        ),
    ],
)
def test_with_bytes_of_a_step_that_are_invented(monkeypatch, method, device):
    family, settings = METHODS[method]
    with torch.device("meta"):
        model = pk.adapt(build(family), settings)
    names = tuple(APPROXIMATIONS)
    options = itertools.product([(), names], [None, 2], [False, True] if device == "cuda" else [False])
    for seed, (allow, tier, graphs) in enumerate(options):
        monkeypatch.setattr(StepBytes, "_counted", invented(seed))
        chooser = chooser_for(model, 1600, 64, allow=allow, device=torch.device(device), tier=tier, graphs=graphs)
        least = chooser.least(allow)
        assert fits(chooser, least) and not fits(chooser, least - 1)
        for above in np.geomspace(1e-4, 4, 16):
            assert fits(chooser, int(least * (1 + above))), (seed, least, above)


@pytest.mark.check
def test_where_a_whole_update_fits_nothing_else_is_counted(monkeypatch):
    with torch.device("meta"):
        model = pk.adapt(build("m2m100"), pk.LoRA(rank=4))
    counted, count = [], invented(0)
    monkeypatch.setattr(StepBytes, "_counted", lambda self, *given: counted.append(given) or count(self, *given))
    found = chooser_for(model, 1600, 64).best(2**32)
    assert found.micro_batches == 1 and set(found.tiers) == {1}
    assert counted == [(1, 25, CHUNKS[0], EXACT)]


def test_a_plan_holds_no_model(monkeypatch):
    monkeypatch.setattr(StepBytes, "_counted", invented(1))
    with torch.device("meta"):
        model = pk.adapt(build("m2m100"), pk.LoRA(rank=4))
    chooser_for(model, 1600, 64).best(2**32)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.slow
@pytest.mark.repeat  # of what the invented bytes show
def test_a_model_from_the_least_on(monkeypatch):
    """Once a parent was refused under 33.3 MiB and 40 MiB, where 33.2 and 36 MiB were enough."""
    monkeypatch.setattr(choosing, "APPROXIMATIONS", {})  # their least takes time to count
    with torch.device("meta"):
        model = pk.adapt(build("m2m100", encoder_layers=2), pk.Adapter(bottleneck=16))
    chooser = chooser_for(model, 64, 16)
    with pytest.raises(InputError) as error:
        chooser.best(1000)
    named = re.search(r"needs ([\d.]+) KiB", str(error.value))[1]
    step = 10.0 ** -len(named.partition(".")[2])
    assert fits(chooser, parse_size(f"{named}KiB"))
    assert not fits(chooser, parse_size(f"{float(named) - step:.4f}KiB"))
    for above in np.linspace(0, 1, 12):
        assert fits(chooser, int(chooser.least(()) * (1 + above))), above


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_search_fits_from_the_named_size_on(monkeypatch, device):
    with torch.device("meta"):
        model = pk.adapt(build("m2m100", encoder_layers=3, decoder_layers=3), pk.LoRA(rank=4))

    class Counted:
        def bytes(self, memory, longest):
            return SearchBytes(memory, 1000.5, 1234.5, 10.25, 100.75)

    monkeypatch.setattr(planning, "Search", lambda *_: Counted())

    def plan(memory: int):
        return plan_search(model, memory, ("dense", "dense"), 3, 20, torch.device(device))

    with pytest.raises(InputError) as error:
        plan(1000)
    named = re.search(r"needs ([\d.]+ \w+);", str(error.value))[1]
    number, unit = named.split()
    step = 10.0 ** -len(number.partition(".")[2])
    assert not _accepted(plan, parse_size(f"{float(number) - step:.4f}{unit}"))
    for above in (0, 1, 1000, 10**5, 10**6):
        plan(parse_size(named) + above)


def test_tier_auto_fits_from_the_named_size_on(monkeypatch):
    model = pk.adapt(build("m2m100"), pk.LoRA(rank=4))
    monkeypatch.setattr(StepBytes, "_counted", invented(3))

    def lean(memory: int):
        return planning.tiers_in_place(model, memory, 1600, 64, None)

    with pytest.raises(InputError) as error:
        lean(MIB)
    named = re.search(r"needs ([\d.]+ MiB)", str(error.value))[1]
    for above in np.geomspace(1, 2, 40):
        lean(int(parse_size(named) * above))
    assert not _accepted(lean, parse_size(named) - MIB // 10)


def _accepted(plan, memory: int) -> bool:
    try:
        plan(memory)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_smallest_budget_is_the_smallest(device):
    for need in (1, 1000, 12345678, 12345678.25, 2**33 + 1):
        budget = smallest_budget(need, device)
        assert usable(budget - 1, device) < need <= usable(budget, device)


def test_what_a_refusal_says_is_enough_and_a_step_less_is_not():
    draw = np.random.default_rng(0)
    for size in [1, 999, 1023, 1024, 1025, 1030, 10_230, *map(int, 2 ** draw.uniform(0, 40, 500))]:
        least = parse_size(format_least(size))
        assert size <= least <= size * 1.01 + 1
        below = {parse_size(format_size(s)) for s in range(max(1, size - size // 100), size, max(1, size // 5000))}
        assert all(other < size for other in below if other < least)
        assert parse_size(format_below(max(1, size - 1), size).replace("bytes", "B").replace(",", "")) <= least
    assert format_below(34_380_000, 34_380_500) == "34,380,000 bytes"
    assert format_below(30 * MIB, 34_324_500) == "30 MiB"
