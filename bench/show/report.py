"""A page of HTML from the results of a folder: no network, no script; a table and a plot for every figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.show.figures import digits, rate, seconds, size
from bench.show.measurements import (
    VERSIONS,
    Measurement,
    Run,
    by_op,
    limit_of,
    peft_settings,
    ratio,
)
from bench.show.medians import load_folder
from bench.show.plots import HUES, Bar, Point, bars, marker_legend, roofline
from bench.show.table import wall_of
from petl_kernels.files import atomic_write

ORDER = {"limit": 0, "ours": 1, "peer": 2}


def write(folder: str | Path) -> Path:
    """Writes ``report.html`` in ``folder`` from the results there and returns its path; InputError without any."""
    runs = load_folder(folder)
    path = Path(folder) / "report.html"
    with atomic_write(path) as file:
        file.write(page(runs))
    return path


def page(runs: Sequence[Run]) -> str:
    device = runs[0].machine.get("device") or "cpu"
    title = f"Bench: {runs[0].machine['cpu_name']}" if device == "cpu" else f"Bench: {device}"
    walls = any(one.wall for run in runs for one in run.measurements)
    body = [f"<h1>{escape(title)}</h1>", _where(runs), READING, WALL if walls else ""]
    body += [_section(run) for run in runs if run.measurements]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


READING = """<p>The limit is the least that anybody has to do: the frozen product alone, or a copy. A bar's length is
time over the limit, with a thin line from the first to the third quartile. Roofline is the time that the machine's
measured matmul and copy rates allow, over the time taken; it is above 100% where the data stayed in a cache that the
measured copy does not fit. Spread is the interquartile range over the median.</p>"""
WALL = """<p>Times and bars are the device's, measured in a queue that is filled ahead of it. Wall is what one call
takes from an idle queue, the host's part included: what a training loop sees where the host is slower than the
device.</p>"""


def _where(runs: Sequence[Run]) -> str:
    return f"<dl>{''.join(map(_where_one, runs))}</dl>"


def _where_one(run: Run) -> str:
    machine, commit = run.machine, run.commit
    where = f"{machine['cpu_name']}, {machine['cores']} cores, {machine.get('threads', '?')} threads"
    if machine.get("device", "cpu") != "cpu":
        where = f"{machine['device']}; {where}"
    tree = f"commit {(commit.get('id') or 'unknown')[:9]}{' with changes beside it' if commit.get('dirty') else ''}"
    date = run.date[:16].replace("T", " ") + " UTC"
    lines = [f"{where}; {date}, {tree}.", f"Measured rates: {_rates(run)}.", f"Versions: {_versions(machine)}."]
    return f"<dt>{escape(run.name)}</dt><dd>{'<br>'.join(map(escape, lines))}</dd>"


def _rates(run: Run) -> str:
    if not run.rates:
        return "not measured"
    matmul = [f"{name} {rate(value, 'FLOP/s')}" for name, value in run.rates.get("matmul", {}).items()]
    return f"copy {rate(run.rates['copy'], 'B/s')}; matmul {', '.join(matmul)}"


def _versions(machine: dict) -> str:
    named = [(name.removesuffix("_version"), machine.get(name)) for name in VERSIONS]
    return ", ".join(f"{name} {version}" for name, version in named if version)


def _section(run: Run) -> str:
    ops = by_op(run.measurements)
    parts = [f'<h2 id="{escape(run.name)}">{escape(run.name)}</h2>', _roofs(run)]
    for op, cases in ops.items():
        parts.append(f"<h3>{escape(op)}</h3>{_panels(cases)}")
        parts.append(f"<details><summary>All figures of {escape(op)}</summary>{_figures(run, cases)}</details>")
    return "".join(parts)


def _roofs(run: Run) -> str:
    """A roofline plot for each dtype whose ops have both operations and bytes."""
    dtypes = list(dict.fromkeys(one.dtype for one in run.measurements))
    return "".join(_roof(run, dtype) for dtype in dtypes)


def _roof(run: Run, dtype: str) -> str:
    own = [one for one in run.measurements if one.dtype == dtype and one.kind != "limit"]
    points = [_point(run, one) for one in own if one.intensity()]
    if not any(point.ours for point in points):
        return ""
    matmul, copy = run.rates.get("matmul", {}).get(dtype), run.rates.get("copy")
    ops = list(dict.fromkeys(one.op for one in run.measurements))
    shapes = list(dict.fromkeys(_shape(one) for one in run.measurements if one.intensity()))
    without = sorted({one.op for one in own if not one.intensity()})
    note = "Ours are labelled; small pale marks are peers."
    if not (matmul and copy):
        note += " No roof: this run measured no rates."
    if without:
        note += f" Not here, without operations or bytes to count: {', '.join(without)}."
    return (
        f"<h3>Roofline, {escape(dtype or 'dtype unknown')}</h3>"
        f'<div class="scroll">{roofline(points, ops, shapes, matmul, copy)}</div>{marker_legend(shapes)}'
        f'<p class="note">{escape(note)}</p>'
    )


def _point(run: Run, one: Measurement) -> Point:
    fraction, intensity, speed = run.roofline(one), one.intensity(), one.flop_rate()
    assert intensity is not None and speed is not None, "the plot has what has operations and bytes to count"
    note = f"{one.op} {one.title}, {one.implementation}: {seconds(one.median)}, {rate(speed, 'FLOP/s')}"
    note += f", {fraction:.0%} of the roofline" if fraction else ""
    return Point(intensity, speed, one.op, _shape(one), note, one.is_ours)


def _shape(one: Measurement) -> str:
    return one.shape or "any shape"


def _panels(cases: Sequence[list[Measurement]]) -> str:
    """Bar plots of all cases of an op, on one axis."""
    bases = [(limit_of(case) or min(case, key=lambda one: one.median)) for case in cases]
    longest = max(one.times.q3 / base.median for case, base in zip(cases, bases, strict=True) for one in case)
    longest = max(longest, *(one.median / base.median for case, base in zip(cases, bases, strict=True) for one in case))
    panels = []
    for case, base in zip(cases, bases, strict=True):
        rows = [_bar(one, base) for one in sorted(case, key=lambda one: (ORDER[one.kind], one.median))]
        over = "" if base.kind == "limit" else " (over the fastest: no limit was timed)"
        panels.append(f"<figure><figcaption>{escape(case[0].title + over)}</figcaption>{bars(rows, longest)}</figure>")
    return f'<div class="panels">{"".join(panels)}</div>'


def _bar(one: Measurement, base: Measurement) -> Bar:
    length = one.median / base.median
    text = f"{digits(length)} × · {seconds(one.median)}" + (f" · wall {wall_of(one)}" if one.wall else "")
    return Bar(one.implementation, length, text, one.kind, (one.times.q1 / base.median, one.times.q3 / base.median))


def _figures(run: Run, cases: Sequence[list[Measurement]]) -> str:
    """Every figure of an op: a row a measurement, a column for each setting of PEFT that was timed.

    Where the median is the device's alone, the wall and its own ratios stand beside it.
    """
    settings = list(dict.fromkeys(one.implementation for case in cases for one in peft_settings(case)))
    predicted = any(one.predicted for case in cases for one in case)
    walls = any(one.wall for case in cases for one in case)
    names = [f"/ {name}" for name in ("limit", *settings)]
    head = ["implementation", "device" if walls else "median", "spread", "samples", *names]
    head += ["wall", *(f"wall {name}" for name in names)] if walls else []
    head += ["FLOP", "bytes", "FLOP/s", "B/s", "roofline", "launches", "peak memory"]
    head += ["predicted", "median / predicted"] if predicted else []
    body = []
    for case in cases:
        peft = {one.implementation: one for one in peft_settings(case)}
        others = [limit_of(case), *(peft.get(name) for name in settings)]
        body.append(f'<tr class="case"><th colspan="{len(head)}">{escape(case[0].title)}</th></tr>')
        for one in sorted(case, key=lambda one: one.median):
            cells = _times_of(one, others)
            cells += [wall_of(one), *(ratio(one, other, wall=True) for other in others)] if walls else []
            cells += _work_of(run, one)
            cells += _prediction(one) if predicted else []
            body.append(f"<tr{' class=ours' if one.is_ours else ''}>{_cells('td', cells)}</tr>")
    return f'<div class="scroll"><table><tr>{_cells("th", head)}</tr>{"".join(body)}</table></div>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _times_of(one: Measurement, others: Sequence[Measurement | None]) -> list[str]:
    times = [one.implementation, seconds(one.median), f"{one.spread:.1%}", str(one.times.samples)]
    return [*times, *(ratio(one, other) for other in others)]


def _work_of(run: Run, one: Measurement) -> list[str]:
    fraction, flops, moved = run.roofline(one), one.flop_rate(), one.byte_rate()
    return [
        _si(one.flops, "FLOP"),
        _si(one.bytes, "B"),
        rate(flops, "FLOP/s") if flops else "",
        rate(moved, "B/s") if moved else "",
        f"{fraction:.0%}" if fraction else "",
        "" if one.launches is None else str(one.launches),
        "" if one.peak_bytes is None else size(one.peak_bytes),
    ]


def _prediction(one: Measurement) -> list[str]:
    return [seconds(one.predicted), digits(one.median / one.predicted)] if one.predicted else ["", ""]


def _si(value: int | None, unit: str) -> str:
    return rate(value, unit) if value else ""


# Hues around the circle, the neighbours in the list far apart; one lightness for a white page and one for a dark.
_HUES = "".join(f".hue{n}{{--c:hsl({(n * 150 + 210) % 360} 65% var(--l))}}" for n in range(HUES))
STYLE = (
    """
:root{--l:38%;--page:#fff;--ink:#1d2329;--soft:#5b6570;--line:#d9dee3;--ours:#1767c4;--peer:#a9b2bb;--limit:#5b6570;
--roof:#c0392b;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--l:68%;--page:#14181c;--ink:#e4e8ec;--soft:#9aa5b0;--line:#333b43;
--ours:#62a8f5;--peer:#5f6b76;--limit:#b4bec8;--roof:#ef7d6d}}
body{background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;max-width:1160px;
margin:0 auto;padding:16px}
h1{font-size:1.6em;margin:.3em 0}h2{font-size:1.35em;margin:1.6em 0 .4em;border-bottom:1px solid var(--line)}
h3{font-size:1.1em;margin:1.4em 0 .5em}
.note,.legend,figcaption{color:var(--soft);font-size:14px}.legend span{display:inline-block;margin-right:14px}
.legend svg{vertical-align:-3px}
dt{font-weight:600}dd{margin:0 0 .6em;font-size:14px}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:3px 0 3px 18px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0}
tr.case th{color:var(--ink);padding-top:12px}
tr.ours td{font-weight:600;color:var(--ours)}
details{margin:.6em 0}summary{cursor:pointer;color:var(--ours);font-size:15px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:18px 28px}
figure{margin:0}figcaption{margin-bottom:4px;color:var(--ink)}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg.wide{width:100%;min-width:860px}
svg.bars{width:100%;max-width:380px;overflow:visible}svg.bars text{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--line)}.roof{fill:none;stroke:var(--roof);stroke-width:2}.one{stroke:var(--soft);stroke-dasharray:3 3}
.mark{fill:var(--c,var(--soft))}.pale{fill:var(--peer);opacity:.75}
.lead{stroke:var(--c);opacity:.5}
svg text.label{fill:var(--c);font-weight:600}
.bar rect{fill:var(--peer)}.bar.ours rect{fill:var(--ours)}.bar.limit rect{fill:var(--limit)}
.bar.ours text{font-weight:600}.quartiles{stroke:var(--ink);stroke-width:2}
"""
    + _HUES
)
