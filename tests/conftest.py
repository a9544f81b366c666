"""What concerns the whole suite: the order of tests, their repeats, and what a process makes once (README.md)."""

from __future__ import annotations

import gc
import itertools
import os
from collections import defaultdict

import pytest
import torch

# Without a CUDA device the Triton kernels run in Triton's interpreter, which has to be chosen before Triton's import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what -m does not name
def pytest_collection_modifyitems(items: list) -> None:
    """Puts the longest tests, which are processes of their own, first: at the end one worker would wait for them.

    Marks as repeats the cases of a test of three or more parameters that show no pair of values which others do not.
    """
    items.sort(key=lambda item: "test_rehearsal.py" not in item.nodeid)
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("repeat"):
            cases[item.path, item.cls, item.originalname].append(item)
    for some in cases.values():
        chosen = covering([values_of(item) for item in some])
        for i in set(range(len(some))) - chosen:
            some[i].add_marker("repeat")


def values_of(item: pytest.Item) -> list[tuple]:
    """Returns a tuple for each ``parametrize`` of a test and each fixture with parameters, alike where values are."""
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [names.replace(",", " ").split() if isinstance(names, str) else list(names) for names in together]
    axes += [[name] for name in item.callspec.params.keys() - set(itertools.chain(*axes))]
    return [(*sorted(names), *(id(item.callspec.params[name]) for name in sorted(names))) for names in sorted(axes)]


def covering(cases: list[list]) -> set[int]:
    """Returns the places of some ``cases``, each a list of values, with every pair of values that any of them has."""
    pairs = [set(itertools.combinations(case, 2)) or {tuple(case)} for case in cases]
    left, chosen = set().union(*pairs), set()
    while left:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & left))  # of several the first
        chosen.add(best)
        left -= pairs[best]
    return chosen


def pytest_collection_finish() -> None:
    """Takes what imports have made, half a million objects, out of the collector's sight: each run collects (0.5 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def bytes_of_steps_counted_once():
    from counted_once import counted_once

    with counted_once():
        yield
