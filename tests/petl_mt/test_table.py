"""The tables of study and demo: their 80 columns, and their words for bytes."""

from __future__ import annotations

import io

from petl_mt.scores import Scores
from petl_mt.study import Row
from petl_mt.study.tables import COLUMNS, NARROW, cells, markdown, print_table
from rich.console import Console

SCORES = Scores(98.765, "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0", 99.9,
                "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0", 1000)  # fmt: skip
WIDEST = Row(
    "adapter-sublayer", "0.1%", scores=SCORES, trained_parameters=123_456_789, trained_share=0.9876, lr=0.000125,
    seconds_per_step=123.456, saved_bytes_per_token=123_456, peak_memory_bytes=33 * 2**20 + 10**5,
    peak_process_bytes=int(1.23 * 2**30),
)  # fmt: skip
PARENT = Row("no adaptation", scores=SCORES, trained_parameters=0, trained_share=0.0)
NOTE = "the nearest it can is 0.12%, with bottleneck 1, which is far more than the budget that was given to it"


def shown(rows: list[Row], width: int) -> list[str]:
    out = io.StringIO()
    print_table(Console(file=out, width=width, highlight=False), rows, "en-fi, 60 steps of 1,024 tokens, seed 1")
    return out.getvalue().splitlines()


def test_the_table_fits_80_columns():
    lines = shown([PARENT, WIDEST, Row("lora", "0.1%", "unreachable", NOTE)], 80)
    assert max(len(line.rstrip()) for line in lines) <= 80
    row = next(line for line in lines if "adapter-sublayer 0.1%" in line)
    assert all(cell in row for cell in cells(WIDEST, NARROW))  # nothing is cut or wrapped
    text = " ".join(line.strip() for line in lines)
    assert NOTE in text and f"BLEU {SCORES.bleu_signature}" in lines


def test_both_kinds_of_bytes_have_their_names():
    assert {"memory", "process"} <= set(NARROW)
    assert cells(WIDEST)[list(COLUMNS).index("memory")] == "33.1 MiB"
    assert cells(WIDEST)[list(COLUMNS).index("process")] == "1.23 GiB"
    for text in ("\n".join(shown([WIDEST], 80)), markdown([WIDEST], "title", {})):
        assert "memory: what --memory counts; process: host memory, Python included" in text
