"""What concerns the whole suite: the order of tests, their repeats, and what a process makes once (README.md)."""

from __future__ import annotations

import gc
import os
from collections import defaultdict

import pytest
import torch
from pairs import covering, values_of

LONGEST = ("test_triton_aot.py", "test_rehearsal.py")

# Without a CUDA device the Triton kernels run in Triton's interpreter, which has to be chosen before Triton's import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what -m does not name
def pytest_collection_modifyitems(items: list) -> None:
    """Puts the longest tests, which are processes of their own, first: at the end one worker would wait for them.

    Marks as repeats the cases of a test of three or more parameters that show no pair of values which others do not.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("repeat"):
            cases[item.path, item.cls, item.originalname].append(item)
    for some in cases.values():
        chosen = covering([values_of(item) for item in some])
        for i in set(range(len(some))) - chosen:
            some[i].add_marker("repeat")


def pytest_collection_finish() -> None:
    """Takes what imports have made, half a million objects, out of the collector's sight: each run collects (0.5 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def bytes_of_steps_counted_once():
    from counted_once import counted_once

    with counted_once():
        yield
