"""One row of a study: trained, scored on the test text, and kept in row.json beside its run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write

from ..inference import Translator
from ..json_file import write_json
from ..memory_meter import MemoryMeter, process_bytes
from ..models.precision import precision_of
from ..runs import RunFolder
from ..scores import Scores, score_lines
from ..terminal import Watch
from ..train import TrainingStopped, train
from .grid import Entry, StudyConfig

PARENT = "no adaptation"


@dataclass
class Row:
    """One line of the table.

    status: done, unreachable (the budget of parameters), stopped (the loss was no number) or failed (the method does
    not fit into ``--memory``, or its process was killed).
    """

    method: str
    params: str | None = None
    status: str = "done"
    note: str = ""
    scores: Scores | None = None
    valid_loss: float | None = None
    trained_parameters: int | None = None  # that are stored, of the model's
    trained_share: float | None = None
    lr: float | None = None
    steps: int | None = None
    best_step: int | None = None
    seconds: float | None = None  # the whole run, scoring included
    seconds_per_step: float | None = None
    saved_bytes_per_token: float | None = None  # kept for backward
    peak_memory_bytes: int | None = None  # of what a budget counts, training and scoring; petl_mt/memory_meter.py
    peak_process_bytes: int | None = None  # host memory of the row's process
    seed: int | None = None
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.method if self.params is None else f"{self.method} {self.params}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        scores = values.pop("scores")
        return cls(**values, scores=Scores(**scores) if scores else None)


def parent_row(config: StudyConfig, text: tuple, quiet: bool) -> Row:
    """Returns the row of the parent as it is; text: the lines of the test text, (source, target)."""
    began = time.perf_counter()
    scores, memory = _score(config, None, text, quiet)
    row = Row(
        PARENT,
        scores=scores,
        trained_parameters=0,
        trained_share=0.0,
        steps=0,
        seconds=time.perf_counter() - began,
        peak_memory_bytes=memory,
        peak_process_bytes=process_bytes(),
        config=_fingerprint(config, None),
    )
    write_json(config.folder(None) / "row.json", row.to_dict())
    return row


def run(config: StudyConfig, entry: Entry, text: tuple, quiet: bool) -> Row:
    """Trains the run of ``entry``, or goes on with it, and returns its row; text: the lines of the test text."""
    settings = config.for_entry(entry)
    folder = RunFolder(config.folder(entry))
    began = time.perf_counter()
    try:
        result = train(settings, resume=True, quiet=quiet)
    except TrainingStopped as error:
        return Row(
            entry.method, entry.params, "stopped", str(error), seed=settings.seed, config=_fingerprint(config, entry)
        )
    scores, memory = _score(config, entry, text, quiet)
    trained = result.peak_memory_bytes
    row = Row(
        entry.method,
        entry.params,
        scores=scores,
        valid_loss=result.valid_loss,
        trained_parameters=round(result.trained_share * result.total_parameters),
        trained_share=result.trained_share,
        lr=folder.read_config().lr,
        steps=result.steps,
        best_step=result.best_step,
        seconds=time.perf_counter() - began,
        seconds_per_step=result.seconds_per_step,
        saved_bytes_per_token=result.saved_bytes_per_token,
        peak_memory_bytes=None if memory is None or trained is None else max(memory, trained),
        peak_process_bytes=process_bytes(),
        seed=settings.seed,
        config=_fingerprint(config, entry),
    )
    write_json(folder.path / "row.json", row.to_dict())
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # only resuming needs them
    return row


def _score(config: StudyConfig, entry: Entry | None, text: tuple, quiet: bool) -> tuple[Scores, int | None]:
    """Returns BLEU and chrF of the test text, and the bytes of memory that its search took.

    The search keeps the budget where there is one. The translations are written to test.hyp in the entry's folder.
    """
    pair, folder = config.test, config.folder(entry)
    folder.mkdir(parents=True, exist_ok=True)
    meter = MemoryMeter(resolve())
    with ExitStack() as limits:
        run = folder if entry is not None else dataclasses.replace(config.base, out=str(folder))
        translator = Translator(run, pair.src_lang, pair.tgt_lang, limits=limits)
        meter.watch(translator.model)
        with Watch(f"score {folder.name}", len(text[0]), "lines", quiet) as watch:
            lines = list(translator.stream(text[0], told=watch.at))
        memory = meter.memory()
    with atomic_write(folder / "test.hyp") as file:
        file.write("".join(line + "\n" for line in lines))
    return score_lines(lines, text[1], pair.tgt_lang, config.base.bleu_tokenize), memory


# In the parent's row since a later version; rows without them stay.
_OF_BUDGETS = ("memory", "precision")


def _fingerprint(config: StudyConfig, entry: Entry | None) -> dict[str, Any]:
    """Returns what decides a row, in JSON's types; the content of the text files is part of it."""
    run = config.base if entry is None else config.for_entry(entry)
    values = {**run.to_dict(), "precision": precision_of(run), "test": dataclasses.asdict(config.test)}
    values.pop("out")
    texts = [config.test] if entry is None else [*run.train, *run.valid, config.test]
    if entry is None:  # translating needs no more
        values = {key: values[key] for key in ("model", "test", "beam", "max_length", "bleu_tokenize", *_OF_BUDGETS)}
        if run.memory is None:
            values["precision"] = None  # the search outside of a budget is in fp32
    values["digests"] = {path: _digest(path) for pair in texts for path in (pair.source, pair.target)}
    return json.loads(json.dumps(values))


def _digest(path: str) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def finished_row(config: StudyConfig, entry: Entry | None) -> Row | None:
    """Returns the row that an earlier call has finished, None where there is none; entry: None for the parent.

    Raises InputError for a damaged one, and for one of another study.
    """
    path = config.folder(entry) / "row.json"
    if not path.exists():
        return None
    try:
        row = Row.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if row.config is None:
            raise TypeError("config: null")
        before = dict(row.config)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged; remove it, and the row is made again") from None
    wanted = _fingerprint(config, entry)
    older = [key for key in _OF_BUDGETS if entry is None and key not in before]
    differing = [key for key in wanted if key not in older and before.get(key) != wanted[key]]
    if differing:
        shown = ", ".join(f"{key} ({before.get(key)} -> {wanted[key]})" for key in differing)
        raise InputError(f"out {path.parent}: holds a row of another study: {shown}; expected another --out")
    return row
