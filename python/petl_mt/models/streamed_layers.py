"""A place on disk for layers that are read from a file while a step runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_for_layers(plan, run: Path) -> Iterator[Path | None]:
    """Yields a temporary folder on the disk of the folder ``run`` where ``plan`` streams layers on the CPU, else None.

    The file of the layers is mapped before the block ends, and needs no name after that.
    """
    if plan is None or not plan.streamed or plan.device != "cpu":
        yield None
        return
    existing = next(folder for folder in (run, *run.resolve().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="petl-mt-", dir=existing) as name:
        yield Path(name)
