"""Tables of figures for a terminal, and plain text elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence

from bench.show.figures import digits, seconds, size
from bench.show.measurements import Measurement, Run, limit_of, peft_settings, ratio

PLAIN_WIDTH = 1000  # no line is folded outside a terminal
TAIL = ("GFLOP/s", "GB/s", "roofline", "peak memory")


def case_table(case: Sequence[Measurement], run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one case, fastest first: time, spread, ratios, rates, fraction of the roofline, peak memory.

    On a GPU the device's time and its ratios, then the wall's and its own; on a CPU they are the same, and stand once.
    """
    others = [other for other in (limit_of(case), *peft_settings(case)) if other]
    walls = any(one.wall for one in case)
    names = [f"/ {other.implementation}" for other in others]
    head = ["implementation", "device" if walls else "median", "spread", *names]
    head += ["wall", *(f"wall {name}" for name in names)] if walls else []
    head += TAIL
    rows = []
    for one in sorted(case, key=lambda m: m.median):
        wall = [wall_of(one), *(ratio(one, other, wall=True) for other in others)] if walls else []
        flops, moved, roofline = one.flop_rate(), one.byte_rate(), run.roofline(one)
        rows.append(
            [
                one.implementation,
                seconds(one.median),
                f"{one.spread:.1%}",
                *(ratio(one, other) for other in others),
                *wall,
                digits(flops / 1e9) if flops else "",
                digits(moved / 1e9) if moved else "",
                f"{roofline:.0%}" if roofline else "",
                "" if one.peak_bytes is None else size(one.peak_bytes),
            ]
        )
    return head, rows


def wall_of(one: Measurement) -> str:
    return seconds(one.wall) if one.wall else ""


def render(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], terminal: bool, width: int, left: int = 1
) -> str:
    """A table as text: colours and the terminal's ``width`` on a terminal; all of every line elsewhere.

    The first ``left`` columns are words, the others numbers. A column without any figure is left out.
    """
    from rich.console import Console
    from rich.table import Table

    text = io.StringIO()
    console = Console(
        file=text,
        width=width if terminal else PLAIN_WIDTH,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        highlight=False,
        markup=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim" if terminal else "")
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    for column in shown:
        table.add_column(head[column], justify="left" if column < left else "right", no_wrap=column == 0)
    for row in rows:
        table.add_row(*(row[column] for column in shown), style="bold" if row[0].startswith("ours") else None)
    console.print(title, style="bold" if terminal else None)
    console.print(table)
    lines = text.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
