"""A place on disk for layers that are read from a file while a step runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from petl_kernels.planning.resident import streamed_weights

from ..checks import check_space


@contextmanager
def folder_for_layers(plan, like: nn.Module | None, run: Path) -> Iterator[Path | None]:
    """Yields a temporary folder on the disk of the folder ``run`` where ``plan`` streams layers on the CPU, else None.

    like: the model as it will run, on the meta device. The file of the layers is mapped before the block ends, and
    needs no name after that. Raises InputError for a disk without room for it.
    """
    if plan is None or like is None or not plan.streamed or plan.device != "cpu":
        yield None
        return
    need = sum(like.get_parameter(name).nbytes for name in streamed_weights(like, plan.streamed))
    check_space("out", run, need, "the file of streamed layers")
    existing = next(folder for folder in (run, *run.resolve().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="petl-mt-", dir=existing) as name:
        yield Path(name)
