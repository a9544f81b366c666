"""Writes the tables of docs/CARDS.md: which cards the kernels are compiled for, and what the compiler says of them.

`PYTHONPATH=.:python python tests/backends/card_tables.py`, without a card; each kernel's first launch takes its own
compilation, in all some minutes of two cores. `... card_tables.py REPORTS` reads what `triton_aot.py first CARD...` has
printed into a file instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import triton_aot

from petl_kernels import cards

PAGE = Path(__file__).parents[2] / "docs/CARDS.md"
AMD_SHARED_MEMORY = 64 << 10  # of a work group, on gfx90a and on gfx942
BEGIN, END = "<!-- tables: tests/backends/card_tables.py -->\n", "<!-- end of tables -->\n"


def main(*files: str) -> None:
    lines = Path(files[0]).read_text().splitlines() if files else compiled()
    reports = [json.loads(line) for line in lines]
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1].lstrip("\n")
    PAGE.write_text(f"{before}{BEGIN}\n{cuda_table(reports)}\n{amd_table(reports)}\n{END}\n{after}")


def compiled() -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        triton_aot.main("first", *triton_aot.CARDS, *triton_aot.AMD)
    return printed.getvalue().splitlines()


def cuda_table(reports: list[dict]) -> str:
    """Returns a row for each CUDA card. A launch that stands for another card's counts for it, too."""
    classes = {kind.name: kind for kind in cards.CLASSES}
    rows = [
        "| | class | cards of the class | dtypes | KB for a block | a kernel's most | Triton's products | serves |",
        "|---|---|---|---|---:|---:|---|---|",
    ]
    for name, card in triton_aot.CARDS.items():
        kind = classes[card.kind]
        most = max(report["shared"] for report in reports if name in report["cards"])
        products = "tensor cores; fp32: CUDA cores" if kind.tensor_cores else "CUDA cores"
        rows.append(
            f"| sm_{name[2:]} | {kind.name} | {kind.cards} | {kind.dtypes()} | {kind.shared_memory >> 10} | "
            f"{most / 1024:.0f} | {products} | Triton{'' if kind.bf16 else '; in bf16 plain PyTorch'} |"
        )
    return "\n".join(rows) + "\n"


def amd_table(reports: list[dict]) -> str:
    """Returns a row for each AMD card: kernels that become code, and of these those that the card could not start."""
    rows = ["| | kernels | compiled | with matrix instructions | over 64 KB | spill |", "|---|---:|---:|---:|---|---|"]
    for name in triton_aot.AMD:
        own = [report for report in reports if report["card"] == name]
        made = [report for report in own if report["error"] is None]
        matrix = {report["kernel"] for report in made if report["instructions"]["v_mfma"]}
        large = {report["kernel"] for report in made if report["shared"] > AMD_SHARED_MEMORY}
        spilled = {report["kernel"] for report in made if report["stack"]}
        counts = len({report["kernel"] for report in own}), len({report["kernel"] for report in made}), len(matrix)
        rows.append(f"| {name} | {' | '.join(map(str, counts))} | {_names(large)} | {_names(spilled)} |")
        rows += [f"| | | {report['kernel']}: {report['error']} | | | |" for report in own if report["error"]]
    return "\n".join(rows) + "\n"


def _names(kernels: set[str]) -> str:
    return ", ".join(f"`{kernel}`" for kernel in sorted(kernels)) or "-"


if __name__ == "__main__":
    main(*sys.argv[1:])
