"""``petl-mt demo``: a parent that never saw Finnish or Turkish is adapted to them, with each method, in minutes.

Nothing is downloaded: the text is made (text.py), the parent ships with the package (parent.yaml says how it was made).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.interop.languages import LanguagePair

from ..checks import check_folder
from ..config import Pair, TrainConfig
from ..evaluate import translate
from ..scores import Scores, score_lines
from ..silence import hush
from ..study.grid import StudyConfig
from ..study.rows import PARENT, Row
from ..study.run import run_study, title
from ..study.tables import cells, print_table, table_console
from ..terminal import time_left
from ..train import train
from .make_parent import parent_folder
from .text import parallel_lines, write_pair

PAIRS = ("en-fi", "en-tr")
SHARE = 0.85  # share of the minutes that is planned with; the rest is for a machine that slows down


@dataclass
class Plan:
    """The work of the demo; the defaults fit five minutes on two cores."""

    grids: dict[str, Sequence[str]] = field(default_factory=lambda: {
        "en-fi": ("full", "adapter=10%,1%", "parallel=10%", "lora=10%,1%", "cross-attention", "prefix=1%", "bitfit"),
        "en-tr": ("full", "adapter=10%"),
    })  # fmt: skip
    # Higher than the trainer's defaults: sixty steps must carry the parent into a language it has never written.
    lr: dict[str, float] = field(
        default_factory=lambda: {
            "full": 2e-3,
            "cross-attention": 4e-3,
            "adapter": 8e-3,
            "parallel": 4e-3,
            "lora": 5e-3,
            "prefix": 2e-2,
            "bitfit": 2e-2,
        }
    )
    steps: int = 60
    train: int = 3000
    test: int = 80
    own: int = 50  # lines of the parent's own pair
    batch_tokens: int = 1024
    beam: int = 4
    seed: int = 1
    examples: int = 3

    @property
    def rows(self) -> int:
        """Runs in all, the parent's included."""
        return sum(1 + sum(item.count(",") + 1 for item in grid) for grid in self.grids.values())


def run_demo(out: str | Path, pairs: Sequence[str] = PAIRS, minutes: float = 5.0, plan: Plan | None = None,
             model: str | Path | None = None) -> dict[str, list[Row]]:  # fmt: skip
    """Runs the demo into the folder ``out``; returns the rows of each pair. Finished rows there are not run again."""
    began = time.perf_counter()
    plan = plan or Plan()
    plan.grids = {pair: plan.grids[pair] for pair in pairs}
    model, out = str(model or parent_folder()), Path(out)
    check_folder("out", out)
    console = table_console()
    studies = {pair: _study(plan, pair, model, out) for pair in pairs}
    text = studies[pairs[0]].base
    console.print(
        f"text: {plan.train:,} training and {plan.test} test lines for each of {', '.join(pairs)}, from CLDR; "
        f"for example\n  {_first_line(text.train[0].source)}\n  {_first_line(text.train[0].target)}"
    )
    with hush():
        scores, seconds = _own_pair(plan, model)
    console.print(f"parent: BLEU {scores.bleu:.1f} on its own pair en-de ({scores.sentences} lines it has not seen)")

    steps = _steps_of(out) or _fitting_steps(plan, studies[pairs[0]].base, minutes * 60 * SHARE, began, seconds)
    if steps < plan.steps:
        console.print(
            f"{steps} steps instead of {plan.steps}, to fit {minutes:g} minutes on this machine: expect lower "
            "BLEU than in the documentation"
        )
    results, say = {}, _Rows(console, plan.rows)
    for pair, study in studies.items():
        study.base.steps, study.base.eval_every = steps, steps
        results[pair] = run_study(study, quiet=True, on_row=lambda row, pair=pair: say(pair, row))
    for pair, study in studies.items():
        console.print()
        print_table(console, results[pair], title(study))
        _print_examples(console, study, results[pair], plan.examples)
    console.print(f"\nwritten: {', '.join(str(out / pair / 'study.{md,json,png}') for pair in pairs)}")
    console.print(f"{time.perf_counter() - began:.0f} seconds")
    return results


def _study(plan: Plan, pair: str, model: str, out: Path) -> StudyConfig:
    files = write_pair(out / "text", pair, plan.train, 1, plan.test, plan.seed)
    texts = {split: Pair(*pair.split("-"), *map(str, files[split])) for split in ("train", "test")}
    base = TrainConfig(model=model, out=str(out / pair), train=[texts["train"]], steps=plan.steps, max_length=128,
                       batch_tokens=plan.batch_tokens, beam=plan.beam, seed=plan.seed)  # fmt: skip
    return StudyConfig(base, texts["test"], plan.grids[pair], plan.lr)


def _own_pair(plan: Plan, model: str) -> tuple[Scores, float]:
    """Returns the scores of the parent on en-de, and the seconds that one line took."""
    rows = parallel_lines(("en", "de"), "test", plan.own, plan.seed)
    parent, tokenizer = load_pretrained(model)
    began = time.perf_counter()
    lines, _ = translate(parent, LanguagePair(parent, tokenizer, "en", "de"), [row[0] for row in rows], plan.beam)
    seconds = (time.perf_counter() - began) / len(rows)
    return score_lines(lines, [row[1] for row in rows], "de"), seconds


def _fitting_steps(plan: Plan, base: TrainConfig, budget: float, began: float, line_seconds: float) -> int:
    """Returns the plan's steps, or fewer where a trial shows that they would take longer than ``budget`` seconds."""
    trial = 4
    with tempfile.TemporaryDirectory() as folder:
        tried = train(TrainConfig(model=base.model, out=f"{folder}/trial", train=base.train, method="full", steps=trial,
                                  batch_tokens=base.batch_tokens, max_length=base.max_length), quiet=True)  # fmt: skip
    left = budget - (time.perf_counter() - began) - plan.rows * (plan.test * line_seconds + 1)
    fitting = int(left / max(1, plan.rows - len(plan.grids)) / tried.seconds_per_step)
    return min(plan.steps, max(trial, fitting))


def _steps_of(out: Path) -> int | None:
    """Returns the steps of the demo that ``out`` holds already, with which it goes on; None where there is none."""
    for path in sorted(out.glob("*/study.json")):
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["config"]["steps"])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}: damaged; remove it, and the demo begins anew") from None
    return None


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip()


class _Rows:
    """Prints each row when it is there, and how long the others will take."""

    def __init__(self, console, rows: int) -> None:
        self.console, self.rows, self.done, self.began = console, rows, 0, time.perf_counter()

    def __call__(self, pair: str, row: Row) -> None:
        self.done += 1
        left = time_left(time.perf_counter() - self.began, self.done, self.rows)
        place = f"{self.done} of {self.rows}" + (f", {left}" if left else "")
        if row.status != "done" or row.scores is None:
            self.console.print(f"{pair} {row.name:<16} {row.status}: {row.note}  ({place})")
            return
        share, took = cells(row, ("share",))[0], f"{row.seconds:.0f} s" if row.seconds else ""
        self.console.print(f"{pair} {row.name:<16}{share:>7} trained  BLEU {row.scores.bleu:4.1f} {took:>5}  ({place})")


def _print_examples(console, study: StudyConfig, rows: Sequence[Row], count: int) -> None:
    """Prints the first test sentences, with the translations of the parent, full fine-tuning, an adapter and LoRA."""
    from rich.table import Table  # here: drawn on a terminal only

    named = {row.method: row for row in reversed(rows) if row.status == "done"}
    shown = {"source": Path(study.test.source), "reference": Path(study.test.target)}
    for method in (PARENT, "adapter", "lora", "full"):
        if method in named:
            row = named[method]
            entry = next((e for e in study.entries() if (e.method, e.params) == (row.method, row.params)), None)
            shown[row.name] = study.folder(entry) / "test.hyp"
    lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in shown.items()}
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for index in range(min(count, len(lines["source"]))):
        for name in lines:
            grid.add_row(name, shorten(lines[name][index]))
        grid.add_row()
    console.print(grid)


def shorten(line: str, longest: int = 60) -> str:
    """Returns the line, or its beginning with an ellipsis where it has more than ``longest`` characters."""
    return line if len(line) <= longest else line[: longest - 1] + "…"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo = parser.add_argument_group("demo")
    told = "folder to write; finished rows in it are not run again (default: runs/demo)"
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help=told)
    demo.add_argument("--pair", choices=(*PAIRS, "both"), default="both", help="languages to adapt to (default: both)")
    told = "minutes it may take; on a slow machine fewer steps are made (default: 5)"
    demo.add_argument("--minutes", type=float, metavar="X", default=5.0, help=told)


def run_command(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.minutes < math.inf:
        raise InputError(f"minutes {arguments.minutes:g}: expected more than 0, and an end")
    if not arguments.out:
        raise InputError("out '': expected a folder")
    run_demo(arguments.out, PAIRS if arguments.pair == "both" else (arguments.pair,), arguments.minutes)
