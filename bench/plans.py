"""Plans for published shapes under budgets of memory, for a card that is not here: nothing is trained.

    python -m bench.plans [SHAPE ...]     writes results/cpu/plans.json and the table of docs/MEMORY.md

bf16, LoRA of rank 16 on q and v, updates of 4,096 tokens in sentences of up to 128, exact levers only. Bytes are
counted; seconds follow from assumed rates (ASSUMED in planning/cost.py): they order plans rather than predict a card.
"""

from __future__ import annotations

import json
import sys
import time

import torch

import petl_kernels as pk
from bench.budget import adapted
from bench.kept_bytes import write_table
from bench.shapes import config
from bench.where import RESULTS, commit
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write
from petl_kernels.interop.hf import skeleton
from petl_kernels.planning.cost import ASSUMED
from petl_kernels.units import format_size

SHAPES = ("nllb-600m", "nllb-1.3b", "nllb-3.3b", "mbart", "madlad-3b", "madlad-10b")
BUDGETS = (4, 6, 8, 12, 16, 24)
PLANS = RESULTS / "cpu" / "plans.json"
MARKERS = ("<!-- table: python -m bench.plans -->", "<!-- end of the table of plans -->")


def main() -> None:
    found = json.loads(PLANS.read_text())["plans"] if PLANS.exists() else {}
    for name in sys.argv[1:] or SHAPES:
        found[name] = {"commit": commit(), **plans(name)}
    head = {
        "command": "python -m bench.plans",
        "torch": torch.__version__,
        "device": "cuda, planned on a CPU",
        "rates": f"assumed, not measured: {ASSUMED}",
    }
    with atomic_write(PLANS) as file:
        json.dump({**head, "plans": found}, file, indent=1)
        file.write("\n")
    write_table(table(found), 0, *MARKERS)


def plans(name: str) -> dict[str, dict]:
    """Returns by budget the plan, or why there is none, and the seconds that planning took."""
    model, found = adapted(skeleton(config(name))), {}
    for gib in BUDGETS:
        began = time.perf_counter()
        try:
            options = {"max_length": 128, "device": "cuda", "autocast": torch.bfloat16}
            line = {"plan": pk.plan(model, f"{gib}GiB", 4096, **options).to_dict()}
        except InputError as error:
            line = {"refused": str(error)}
        found[f"{gib}GiB"] = {"seconds_to_plan": round(time.perf_counter() - began, 1), **line}
        print(name, gib, found[f"{gib}GiB"]["seconds_to_plan"], flush=True)
    return found


def table(found: dict[str, dict]) -> list[tuple[str, ...]]:
    lines = [("model", *(f"{gib} GiB" for gib in BUDGETS))]
    for name in filter(found.__contains__, SHAPES):
        lines.append((name, *(cell(found[name][f"{gib}GiB"]) for gib in BUDGETS)))
    return lines


def cell(line: dict) -> str:
    if "refused" in line:
        return "nothing exact"
    plan = line["plan"]
    tiers = sorted(set(plan["tiers"]))
    parts = [f"{plan['micro_batches']} × {plan['micro_tokens']:,}", f"tier {'–'.join(map(str, tiers))}"]
    if plan["streamed"]:
        parts.append(f"{plan['streamed']} of {len(plan['tiers'])} streamed")
    return f"{', '.join(parts)}; {format_size(plan['peak'])}, {plan['seconds']:.2g} s"


if __name__ == "__main__":
    main()
