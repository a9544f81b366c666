"""Checks before any work: launchers, files that are one, text that has changed, outputs without a place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from petl_kernels.errors import InputError
from petl_kernels.units import format_least, format_size

from .config import Pair, ResolvedConfig, TrainConfig

# Variables in which launchers keep the number of processes: torchrun and accelerate, Open MPI, MPICH, MVAPICH.
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
AT_ONCE = 2**22  # bytes that are read at once


def check_one_process() -> None:
    """Raises InputError in a process of a launcher that has started several."""
    for name in COUNTS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise InputError(
                f"{name} {count}: petl-mt works in one process on one device; start it without torchrun, accelerate "
                "launch or mpirun"
            )


def check_files(config: TrainConfig) -> list[str]:
    """Raises InputError for a training pair of one file; returns lines on other files that are given twice."""
    for pair in config.train:
        check_two_files(pair)
    lines = [
        f"valid {pair.name}: {pair.source} is its source and its target; the scores say nothing of translation"
        for pair in config.valid
        if _same(pair.source, pair.target)
    ]
    for i, pair in enumerate(config.train):
        if any(_both_same(pair, other) for other in config.train[:i]):
            lines.append(f"train {pair.name}: {pair.source} and {pair.target} are given twice, and count twice")
    for pair in config.valid:
        if any(_same(ours, theirs) for other in config.train for ours, theirs in _sides(pair, other)):
            lines.append(
                f"valid {pair.name}: {pair.source} or {pair.target} is trained on, too; the best checkpoint and the "
                "scores say nothing of other text"
            )
    return lines


def little_effect(config: ResolvedConfig) -> list[str]:
    """Returns lines on options with little effect in a run of so many steps."""
    lines = []
    if config.warmup >= config.steps > 1:
        lines.append(
            f"warmup {config.warmup}: the run of {config.steps} steps ends before the rate is at lr {config.lr:g}"
        )
    if config.valid and config.eval_every > config.steps:
        lines.append(f"eval_every {config.eval_every}: the run of {config.steps} steps is evaluated once, at its end")
        if config.patience is not None:
            lines.append(f"patience {config.patience}: no effect, since there is one evaluation")
    return lines


def check_two_files(pair: Pair) -> None:
    """Raises InputError where source and target are one file."""
    if _same(pair.source, pair.target):
        raise InputError(f"{pair.source}: given as source and as target; expected two files")


def _sides(one: Pair, other: Pair) -> list[tuple[str, str]]:
    return [(one.source, other.source), (one.target, other.target)]


def _both_same(one: Pair, other: Pair) -> bool:
    return one.name == other.name and all(_same(*side) for side in _sides(one, other))


def _same(one: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # reading it says what is wrong
        return False


def names_of(pairs: Sequence[Pair]) -> list[str]:
    """Returns a name for each pair: that of its languages, with a number where several pairs have the same."""
    count, seen, names = Counter(pair.name for pair in pairs), Counter(), []
    for pair in pairs:
        seen[pair.name] += 1
        names.append(pair.name if count[pair.name] == 1 else f"{pair.name}.{seen[pair.name]}")
    return names


def text_sums(config: TrainConfig) -> dict[str, dict]:
    """Returns {"bytes", "sha256"} of each file of text that the run reads, by path."""
    files = [path for pair in [*config.train, *config.valid] for path in (pair.source, pair.target)]
    return {path: file_sum(path) for path in dict.fromkeys([*files, *config.vocab_text])}


def file_sum(path: str | Path) -> dict:
    """Returns {"bytes", "sha256"} of a file. Raises InputError where it cannot be read."""
    total, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while part := file.read(AT_ONCE):
                total.update(part)
                size += len(part)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a text file") from None
    return {"bytes": size, "sha256": total.hexdigest()}


def check_same_text(path: Path, now: dict[str, dict]) -> None:
    """Raises InputError where the sums ``now`` differ from those that the JSON file ``path`` has."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        before = {str(name): {"bytes": sums["bytes"], "sha256": sums["sha256"]} for name, sums in before.items()}
    except FileNotFoundError:  # of a run that an earlier version has begun
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged; remove it to resume without a look at the text") from None
    for name, sums in now.items():
        if name in before and before[name] != sums:
            old, new = before[name]["bytes"], sums["bytes"]
            sizes = f"{old:,} bytes then, {new:,} now" if old != new else f"{new:,} bytes as then, other content"
            raise InputError(f"{name}: has changed since the run began ({sizes}); expected the text of the run")


def check_folder(name: str, folder: str | Path) -> None:
    """Raises InputError for a folder that cannot be made, or written to; ``name`` is its option."""
    place = _existing(Path(folder))
    if not place.is_dir():
        raise InputError(f"{name} {folder}: {place} is no folder; expected one")
    _try_to_write(name, folder, place)


def check_file(name: str, path: str | Path, inputs: Sequence[str | Path] = (), size: int = 0) -> None:
    """Raises InputError for a file that cannot be written, or that is one of ``inputs``; ``name`` is its option.

    size: the bytes that its disk needs to have free.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a device or a pipe
    if any(_same(path, other) for other in inputs):
        raise InputError(f"{name} {path}: is read, too, and would be written over; expected another file")
    if path.is_dir():
        raise InputError(f"{name} {path}: is a folder; expected a file to write")
    if not path.parent.is_dir():
        what = "is no folder" if path.parent.exists() else "there is no such folder"
        raise InputError(f"{name} {path}: {path.parent}: {what}; expected one that is there")
    _try_to_write(name, path, path.parent)
    check_space(name, path, size, "what will be written")


def check_space(name: str, folder: str | Path, need: int, what: str) -> None:
    """Raises InputError for a disk with less than ``need`` bytes free; ``what`` will be written there."""
    free = shutil.disk_usage(_existing(Path(folder))).free
    if free < need:
        raise InputError(
            f"{name} {folder}: {format_size(free)} are free on its disk; expected {format_least(need)} for {what}"
        )


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _try_to_write(name: str, path: str | Path, folder: Path) -> None:
    """Writes to a file without a name, so that nothing is left behind."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise InputError(f"{name} {path}: {error.strerror or error}; expected a place that can be written") from None
