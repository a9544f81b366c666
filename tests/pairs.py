"""Which cases of a test with several parameters show every pair of values: the others are repeats (conftest.py)."""

from __future__ import annotations

import itertools

import pytest


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
