"""The demo's parent, from the text to a merged model: trained, killed, resumed, translated with, scored, merged."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.product.figures import figures_of, inside, losses, metrics
from bench.product.program import Program, Run
from bench.product.text import Text

NEAR = 1e-3  # relative: losses of the same updates before and after a kill; the CPU's are the same to the bit


def whole_way(program: Program, model: Path, text: Text, memory: str, steps: int, flags: Sequence[str]) -> None:
    """Train with a checkpoint after each quarter, kill three updates behind one, resume, translate, score, merge."""
    out, every = program.folder / "run", max(1, steps // 4)
    train = ["train", "--model", str(model), *text.flags(text.train), "--method", "lora", "--method-arg", "rank=8"]
    train += ["--valid", *map(str, text.test), "--memory", memory, "--steps", str(steps)]
    train += ["--eval-every", str(every), "--out", str(out), *flags]
    kill = functools.partial(_far_enough, out, every + min(3, every - 1))
    program("train, killed", train, code=-signal.SIGKILL, until=kill)
    before = losses(out)
    program("train, resumed", ["train", "--resume", "--out", str(out)], functools.partial(_resumed, out, before, steps))
    lines = text.test[0].read_text(encoding="utf-8").splitlines()
    program(
        "translate",
        ["translate", "--run", str(out)],
        lambda run: _lines(program.printed().decode().splitlines(), lines),
        given=text.test[0],
    )
    hypotheses = program.folder / "hypotheses"
    program(
        "score",
        ["score", "--run", str(out), "--test", *map(str, text.test), "--hypotheses", str(hypotheses)],
        lambda run: _scored(run, program.printed().decode(), hypotheses, lines),
    )
    merged = program.folder / "merged"
    program("merge", ["merge", "--run", str(out), "--out", str(merged)], lambda run: _merged(merged, model))


def _far_enough(out: Path, step: int) -> bool:
    """Returns whether a checkpoint is there, and updates behind it are done."""
    return (out / "checkpoints" / "latest").exists() and max(losses(out), default=0) >= step


def _resumed(out: Path, before: dict[int, float], steps: int, run: Run) -> str:
    """Checks that the updates that were lost with the killed run are the same when done again, and all are done."""
    after, result = losses(out), json.loads((out / "result.json").read_text(encoding="utf-8"))
    run.figures |= figures_of(out) | {"updates done again": max(before) - _first_new(out, before)}
    if sorted(after) != list(range(1, steps + 1)) or result["steps"] != steps:
        return f"updates 1 to {max(after, default=0)} are in metrics.jsonl; expected 1 to {steps}"
    other = [step for step in before if abs(after[step] - before[step]) > NEAR * abs(before[step])]
    if other:
        return f"loss of update {other[0]}: {before[other[0]]} before the kill, {after[other[0]]} after it"
    return inside(run, out)


def _first_new(out: Path, before: dict[int, float]) -> int:
    """Returns the last update before the kill that the checkpoint had."""
    saved = [line["step"] for line in metrics(out) if "valid_loss" in line]
    return max((step for step in saved if step <= max(before)), default=0)


def _lines(found: list[str], sources: list[str]) -> str:
    filled = sum(map(bool, found))
    if len(found) != len(sources) or not filled:
        return f"{len(found)} lines, {filled} of them with words; expected one for each of {len(sources)}"
    return ""


def _scored(run: Run, printed: str, hypotheses: Path, sources: list[str]) -> str:
    figures = [line for line in printed.splitlines() if line.startswith(("BLEU", "chrF"))]
    run.figures |= {line.split()[0]: line for line in figures}
    if {line[:4] for line in figures} != {"BLEU", "chrF"}:
        return f"printed {printed[:80]!r}; expected BLEU and chrF"
    return _lines(hypotheses.read_text(encoding="utf-8").splitlines(), sources)


def _merged(folder: Path, model: Path) -> str:
    """Checks names of tensors as the base has them, other values in some, and none that is no number."""
    from safetensors.torch import load_file

    base, found = (
        {name: tensor for path in files.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for files in (model, folder)
    )
    if not set(found) >= set(base):
        return f"{min(set(base) - set(found))} is missing"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        return "a weight is no number"
    changed = [name for name in base if not torch.equal(base[name].float(), found[name].float())]
    return "" if changed else "no weight differs from the base's"
