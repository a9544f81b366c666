"""Figures from the files of a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from bench.product.program import Run
from petl_kernels.units import format_size


def losses(out: Path) -> dict[int, float]:
    """Returns the losses by step, as far as the run has written them down."""
    return {line["step"]: line["loss"] for line in metrics(out) if "loss" in line}


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written


def figures_of(out: Path) -> dict:
    """Returns a finished run's seconds an update, those that its plan expected, and bytes that it planned with."""
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    seconds = [0.0] + [line["seconds"] for line in metrics(out) if "loss" in line]
    updates = [after - before for before, after in zip(seconds, seconds[1:], strict=False)]
    return {
        "seconds an update": round(statistics.median(updates[len(updates) // 2 :]), 4),
        "first update": round(updates[0], 2),
        "planned seconds": round(plan["seconds"], 4),
        "target tokens a second": round(result["target_tokens_per_second"]),
        "planned peak": plan["peak"],
        "memory": plan["memory"],
        "micro-batches": plan["micro_batches"],
        "tiers": f"{min(plan['tiers'])} to {max(plan['tiers'])}",
        "streamed layers": plan["streamed"],
    }


def inside(run: Run, out: Path) -> str:
    memory = run.figures["memory"]
    return f"{format_size(run.taken)} taken; expected at most {format_size(memory)}" if run.taken > memory else ""
