"""Methods against parameter budgets, on one parent and one language pair (after arXiv 2205.11277).

Every entry of the grid is one run of ``train`` in ``OUT/rows/<entry>``; the adapter it leaves is loaded again and
scored on the test text. A row that is finished is not run again, one that was interrupted goes on. Each row has a
process of its own, so that what it took is no other row's, and keeps the budget where there is one.
A row that fails, such as one whose method does not fit into ``--memory``, is named in the table with the reason, the
others run, and the exit code is 2; the next call tries it again.

    OUT/study.md     the table, with signatures, machine and versions
    OUT/study.json   the same for programs
    OUT/study.png    BLEU against trained parameters
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_path, atomic_write
from petl_kernels.interop.hf import load_skeleton
from petl_kernels.methods import METHODS, parse_budget
from petl_kernels.units import format_size

from .apart import apart
from .checks import check_folder
from .config import Pair, TrainConfig, check_keys, each_once, load_yaml
from .data import read_pair
from .evaluate import Scores, score_lines
from .lock import locked
from .memory import MemoryMeter, process_bytes
from .options import FILES, TrainingOptions, languages
from .progress import Watch, say
from .runs import RunFolder, Translator, hush
from .train import TrainingStopped, train

GRID = ("full", "adapter=10%,1%,0.1%", "lora=10%,1%,0.1%", "bitfit", "cross-attention", "prefix=1%")
PARENT = "no adaptation"


@dataclass(frozen=True)
class Entry:
    """One run of the study: a method, and a budget where the method has a size."""

    method: str
    params: str | None = None

    @property
    def folder(self) -> str:
        return self.method if self.params is None else f"{self.method}-{self.params.replace('%', 'pct')}"


@dataclass
class StudyConfig:
    """What all runs share is in ``base``: model, train and valid text, steps, seed, and ``out`` for the whole study."""

    base: TrainConfig
    test: Pair
    grid: Sequence[str] = GRID
    lr: Mapping[str, float] = field(default_factory=dict)  # method -> peak rate; the method's own default elsewhere

    def entries(self) -> list[Entry]:
        return parse_grid(self.grid)

    def folder(self, entry: Entry | None) -> Path:
        """Where an entry's run lies; None is the parent as it is."""
        return Path(self.base.out) / "rows" / ("parent" if entry is None else entry.folder)

    def for_entry(self, entry: Entry) -> TrainConfig:
        return dataclasses.replace(
            self.base,
            method=entry.method,
            params=entry.params,
            lr=self.lr.get(entry.method, self.base.lr),
            out=str(self.folder(entry)),
        )


@dataclass
class Row:
    """One line of the table. ``status``: done, unreachable (the budget of parameters), stopped (the loss was no number)
    or failed (the method does not fit into ``--memory``, or its process was killed)."""

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
    peak_memory_bytes: int | None = None  # of what a budget counts, training and scoring; petl_mt/memory.py
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


def parse_grid(grid: Sequence[str]) -> list[Entry]:
    """``["adapter=10%,1%", "full"]`` as entries, in that order, each once."""
    entries: list[Entry] = []
    for item in grid:
        method, equals, budgets = item.partition("=")
        if method not in METHODS:
            raise InputError(f"grid {item!r}: unknown method {method!r}, expected one of {', '.join(METHODS)}")
        if equals and not budgets:
            raise InputError(f"grid {item!r}: no budget after =, expected for example {method}=10%,1%")
        for budget in budgets.split(",") if equals else (None,):
            if budget is not None:
                parse_budget(budget)
            entries.append(Entry(method, budget))
    if not entries:
        raise InputError("grid: empty, expected entries such as adapter=10%,1% or full")
    return list(dict.fromkeys(entries))


def run_study(config: StudyConfig, quiet: bool = False, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Run what is not finished yet and write the three files; returns the rows, the parent's own first.

    ``on_row`` hears of each row as it is there. Raises InputError for what a user can mend, before the first run.
    Rows run in processes of their own, so a script calls this under ``if __name__ == "__main__"``.
    """
    entries = config.entries()
    for method in config.lr:
        if method not in METHODS:
            raise InputError(f"lr: unknown method {method!r}, expected one of {', '.join(METHODS)}")
    text = read_pair(config.test)
    for entry in entries:
        config.for_entry(entry).check()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        write_study(config, rows)
        if on_row:
            on_row(row)

    with hush():
        model, _ = load_skeleton(config.base.model)  # the sizes of methods need no weights
        problems = {entry: _unreachable(model, entry) for entry in entries}
    check_folder("out", config.base.out)
    Path(config.base.out).mkdir(parents=True, exist_ok=True)
    with locked(Path(config.base.out), "study"):
        with _telling_interrupts(config, None):
            add(_finished(config, None) or apart(_parent_row, config, text, quiet))
        for entry in entries:
            if problems[entry]:
                add(Row(entry.method, entry.params, "unreachable", problems[entry]))
                continue
            with _telling_interrupts(config, entry):
                add(_finished(config, entry) or _row_or_why_not(config, entry, text, quiet))
    return rows


@contextmanager
def _telling_interrupts(config: StudyConfig, entry: Entry | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted in {config.folder(entry)}, whose process has ended; the same command goes on there")
        raise


def _row_or_why_not(config: StudyConfig, entry: Entry, text: tuple, quiet: bool) -> Row:
    """What one method cannot is no reason to leave out those behind it; the row is tried again the next time."""
    try:
        return apart(_run, config, entry, text, quiet)
    except InputError as error:
        return Row(entry.method, entry.params, "failed", str(error), seed=config.base.seed)


def _unreachable(model, entry: Entry) -> str:
    """Why the method cannot have this budget on ``model``; empty when it can."""
    try:
        if entry.params is not None:
            METHODS[entry.method].for_budget(model, parse_budget(entry.params))
    except InputError as error:
        return str(error).rpartition("; ")[2]
    return ""


def _parent_row(config: StudyConfig, text: tuple, quiet: bool) -> Row:
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
    _write_json(config.folder(None) / "row.json", row.to_dict())
    return row


def _run(config: StudyConfig, entry: Entry, text: tuple, quiet: bool) -> Row:
    run = config.for_entry(entry)
    folder = RunFolder(config.folder(entry))
    began = time.perf_counter()
    try:
        result = train(run, resume=True, quiet=quiet)
    except TrainingStopped as error:
        return Row(entry.method, entry.params, "stopped", str(error), seed=run.seed, config=_fingerprint(config, entry))
    scores, memory = _score(config, entry, text, quiet)
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
        peak_memory_bytes=None if memory is None else max(memory, result.peak_memory_bytes),
        peak_process_bytes=process_bytes(),
        seed=run.seed,
        config=_fingerprint(config, entry),
    )
    _write_json(folder.path / "row.json", row.to_dict())
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # only resuming needs them
    return row


def _score(config: StudyConfig, entry: Entry | None, text: tuple, quiet: bool) -> tuple[Scores, int | None]:
    """BLEU and chrF of the test text, and the memory that its search took, inside the budget where there is one.

    The translations go to test.hyp in the entry's folder.
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
    """What decides a row, in JSON's types; the content of the text files is part of it."""
    run = config.base if entry is None else config.for_entry(entry)
    values = {**run.to_dict(), "test": dataclasses.asdict(config.test)}
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


def _finished(config: StudyConfig, entry: Entry | None) -> Row | None:
    path = config.folder(entry) / "row.json"
    if not path.exists():
        return None
    try:
        row = Row.from_dict(json.loads(path.read_text(encoding="utf-8")))
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


# ---- what is written ------------------------------------------------------------------------------------------------


def write_study(config: StudyConfig, rows: Sequence[Row]) -> None:
    out = Path(config.base.out)
    about = machine()
    _write_json(
        out / "study.json",
        {
            "pair": config.test.name,
            "model": config.base.model,
            "seed": config.base.seed,
            "grid": list(config.grid),
            "lr": dict(config.lr),
            "config": config.base.to_dict(),
            "test": dataclasses.asdict(config.test),
            "machine": about,
            "rows": [row.to_dict() for row in rows],
        },
    )
    with atomic_write(out / "study.md") as file:
        file.write(markdown(rows, title(config), about))
    plot(rows, out / "study.png", title(config))


def title(config: StudyConfig) -> str:
    base = config.base
    return f"{config.test.name}, {base.steps:,} steps of {base.batch_tokens:,} tokens, seed {base.seed}"


# name -> the cell of a row, and whether it stands in the terminal's table, which has 80 columns
COLUMNS: dict[str, tuple[Callable[[Row], str], bool]] = {
    "method": (lambda row: row.name, True),
    "trained": (lambda row: _number(row.trained_parameters, ","), False),
    "share": (lambda row: _share(row.trained_share), True),
    "BLEU": (lambda row: _number(row.scores.bleu, ".1f"), True),
    "chrF": (lambda row: _number(row.scores.chrf, ".1f"), True),
    "s/step": (lambda row: _number(row.seconds_per_step, ".3g"), True),
    "B/token": (lambda row: _number(row.saved_bytes_per_token, ",.0f"), True),
    "memory": (lambda row: _size(row.peak_memory_bytes), True),
    "process": (lambda row: _size(row.peak_process_bytes), True),
    "lr": (lambda row: _number(row.lr, ".2g"), True),
}
WORDS = "memory: what --memory counts; process: host memory, Python included"
NARROW = tuple(name for name, (_, shown) in COLUMNS.items() if shown)
WIDTH = 80


def cells(row: Row, columns: Sequence[str] = tuple(COLUMNS)) -> tuple[str, ...]:
    """The row as text, one string a column."""
    if row.status != "done":
        return (row.name, *["-"] * (len(columns) - 1))  # ``notes`` has why
    return tuple(COLUMNS[name][0](row) for name in columns)


def facts(rows: Sequence[Row]) -> list[str]:
    """What stands below the table."""
    return [*notes(rows), WORDS, *signatures(rows)]


def notes(rows: Sequence[Row]) -> list[str]:
    """Why the rows that are not there are not."""
    return [f"{row.name}: {row.status}: {row.note}" for row in rows if row.status != "done"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(value: int | None) -> str:
    return "" if value is None else format_size(value)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share in (0, 1) else f"{share:.2%}"


def signatures(rows: Sequence[Row]) -> list[str]:
    scores = next((row.scores for row in rows if row.scores), None)
    if scores is None:
        return []
    return [f"BLEU {scores.bleu_signature}", f"chrF {scores.chrf_signature}", f"{scores.sentences} test sentences"]


def markdown(rows: Sequence[Row], heading: str, about: Mapping[str, Any]) -> str:
    lines = [f"# {heading}", "", f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", *(f"- {line}" for line in [*facts(rows), ", ".join(f"{k} {v}" for k, v in about.items())])]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], heading: str):
    """The rows as a rich table of at most ``WIDTH`` columns."""
    from rich.box import SIMPLE
    from rich.table import Table

    result = Table(title=heading, box=SIMPLE, show_edge=False, pad_edge=False, padding=0)
    for column in NARROW:
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(*cells(row, NARROW), style=None if row.status == "done" else "dim")
    return result


def print_table(console, rows: Sequence[Row], heading: str) -> None:
    """The table, and below it what is missing, what its bytes are, and the scores' signatures."""
    console.print(table(rows, heading))
    for line in facts(rows):
        console.print(line, soft_wrap=len(line) <= WIDTH, markup=False)


def table_console():
    """Where ``table`` is printed: the terminal, or ``WIDTH`` columns of a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def plot(rows: Sequence[Row], path: str | os.PathLike, heading: str) -> None:
    """BLEU against the share of parameters that is trained, one line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    done = [row for row in rows if row.status == "done"]
    for row in done:
        if row.method in ("full", PARENT):
            style = ("--", "full fine-tuning") if row.method == "full" else (":", PARENT)
            axes.axhline(row.scores.bleu, color="0.35", linestyle=style[0], linewidth=1.2, label=style[1])
    methods = dict.fromkeys(row.method for row in done if row.method not in ("full", PARENT))
    for method, marker in zip(methods, "osD^vP*Xh<>p" * len(methods), strict=False):
        points = sorted((100 * row.trained_share, row.scores.bleu) for row in done if row.method == method)
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=6, linewidth=1.6, label=method)
    if methods:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel("trained parameters, share of the model")
    axes.set_ylabel("BLEU")
    axes.set_title(heading, fontsize=10)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def machine() -> dict[str, Any]:
    """Processor, memory, versions and commit: what a figure needs beside it."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    about: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    about["host memory"] = format_size(psutil.virtual_memory().total)
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
    about["python"] = platform.python_version()
    for package in ("petl-kernels", "torch", "transformers", "sentencepiece", "sacrebleu", "Babel"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return {**about, "commit": commit} if commit else about


def _processor() -> str:
    cores = os.cpu_count()
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return f"{name[1].strip() if name else platform.processor() or platform.machine()} ({cores} cores)"


def _commit() -> str | None:
    """The commit of the tree that this file stands in, with + when it is changed; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        if subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True).returncode:
            return None  # installed into an environment inside somebody else's repository
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")


# ---- petl-mt study --------------------------------------------------------------------------------------------------


def add_parser(commands) -> None:
    """``petl-mt study``: adds the command to the subparsers of ``petl-mt``."""
    parser = commands.add_parser("study", help="the methods over parameter budgets on your text")
    parser.set_defaults(run=_main)
    add = TrainingOptions()
    study = parser.add_argument_group("study")
    told = "the options of petl-mt train, and grid, test, lr; flags go on top (default: none)"
    study.add_argument("--config", metavar="FILE.yaml", help=told)
    study.add_argument("--model", metavar="DIR|ID", help="checkpoint folder or hub id: the parent of all rows")
    study.add_argument("--out", metavar="DIR", help="folder of the study; finished rows in it are not run again")
    default = " ".join(GRID).replace("%", "%%")
    told = f"methods, each with the budgets of its rows (default: {default})"
    study.add_argument("--grid", nargs="+", metavar="METHOD[=BUDGET,...]", help=told)
    told = "highest learning rates of some methods, such as adapter=2e-3 (default: by method and width)"
    study.add_argument("--lr", nargs="+", metavar="METHOD=RATE", help=told)

    text = parser.add_argument_group("text")
    add(text, "--train", "--valid")
    text.add_argument("--test", help="two text files that every row is scored on", **FILES)
    languages(text)
    add(text, "--max-length", "--bleu-tokenize")

    loop = parser.add_argument_group("training of each row")
    add(loop, "--steps", "--batch-tokens", "--accumulate", "--schedule", "--warmup", "--label-smoothing", "--dropout")
    add(loop, "--clip", "--seed", "--eval-every", "--patience", "--beam", "--memory", "--tier", "--precision")


def _main(arguments: argparse.Namespace) -> int:
    config = study_config(arguments)
    rows = run_study(config, on_row=_say)
    print_table(table_console(), rows, title(config))
    print(f"written: {config.base.out}/study.md, study.json, study.png")
    return 2 if any(row.status == "failed" for row in rows) else 0


def _say(row: Row) -> None:
    say("\n".join(notes([row])) or "  ".join(filter(None, cells(row))))


def study_config(arguments: argparse.Namespace) -> StudyConfig:
    """From --config and flags on top of it. Raises InputError for what no row would look at, too."""
    values, where = (load_yaml(arguments.config), arguments.config) if arguments.config else ({}, "flags")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    flags = {key: value for key, value in vars(arguments).items() if value is not None}
    if "lr" in flags:
        flags["lr"] = each_once("lr", map(_rate, flags["lr"]))
    values.update({key: value for key, value in flags.items() if key not in ("run", "command", "config")})
    for key, instead in (("method", "grid"), ("params", "grid: method=budget,..."), ("plan", "memory")):
        if values.get(key) is not None:
            raise InputError(f"{where}: {key} {values[key]!r}: no effect on a study; expected {instead}")
    grid, rates, test = values.pop("grid", GRID), values.pop("lr", None) or {}, values.pop("test", None)
    if isinstance(grid, str) or not all(isinstance(item, str) for item in grid or ()):
        raise InputError(f"{where}: grid {grid!r}: expected a list such as [full, 'adapter=10%,1%']")
    base = TrainConfig.from_dict(values, where)
    return StudyConfig(base, _test_pair(test, values, where), grid or (), _rates(rates, parse_grid(grid or ()), where))


def _test_pair(test: Any, values: Mapping[str, Any], where: str) -> Pair:
    """``[SRC, TGT]`` with the languages beside it, or a list of one mapping."""
    if test is None:
        raise InputError("test: not given; expected a source file and a target file")
    if not isinstance(test, list):
        raise InputError(f"{where}: test {test!r}: expected two files")
    short = len(test) == 2 and all(isinstance(item, str) for item in test)
    languages = {key: values[key] for key in ("src_lang", "tgt_lang") if key in values} if short else {}
    try:
        pairs = check_keys({"train": test, **languages}, where)["train"]
    except InputError as error:
        raise InputError(str(error).replace(f"{where}: train", f"{where}: test")) from None
    if len(pairs) != 1:
        raise InputError(f"{where}: test: {len(pairs)} pairs; expected one, which every row is scored on")
    return pairs[0]


def _rates(rates: Any, entries: Sequence[Entry], where: str) -> dict[str, float]:
    """Rates by method; refused for what is none, and for a method that has no row."""
    if not isinstance(rates, Mapping):
        raise InputError(f"{where}: lr {rates!r}: expected a rate for each method, such as adapter: 2.0e-3")
    result = {}
    for method, rate in rates.items():
        try:
            result[method] = float("nan" if isinstance(rate, bool) else rate)
        except (TypeError, ValueError):
            result[method] = math.nan
        if not 0 < result[method] < math.inf:
            raise InputError(f"{where}: lr {method}={rate}: expected a rate above 0, such as {method}=2e-3")
        if method in METHODS and method not in {entry.method for entry in entries}:
            raise InputError(f"{where}: lr {method}={rate}: no effect, since the grid has no {method}")
    return result


def _rate(text: str) -> tuple[str, str]:
    method, equals, rate = text.partition("=")
    if not (method and equals and rate):
        raise InputError(f"lr {text!r}: expected METHOD=RATE, such as adapter=2e-3")
    return method, rate
