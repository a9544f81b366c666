"""What concerns the whole suite."""

from __future__ import annotations

import gc
import os

import pytest
import torch

# Without a CUDA device the Triton kernels run in Triton's interpreter, which has to be chosen before Triton's import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list) -> None:
    """Puts the longest tests, which are processes of their own, first: at the end one worker would wait for them."""
    items.sort(key=lambda item: "test_rehearsal.py" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Takes what imports have made, half a million objects, out of the collector's sight: each run collects (0.5 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def bytes_of_steps_counted_once():
    from counted_once import counted_once

    with counted_once():
        yield
