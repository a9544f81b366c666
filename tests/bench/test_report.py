"""The page: whole, self-contained, with the figures of its result files; the plots where they belong."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from result_files import entry

from bench.show import plots, report

PEERS = {"limit": 0.01, "ours": 0.0125, "PEFT, defaults": 0.015}


def page_of(result_file, entries, **changes) -> str:
    return report.write(result_file("ops.json", entries, **changes).parent).read_text(encoding="utf-8")


def drawings(page: str) -> list[ElementTree.Element]:
    """Every SVG of the page, parsed: a broken one raises."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_page_has_machine_figures_and_plots(result_file):
    page = page_of(result_file, [entry(name, time) for name, time in PEERS.items()], dirty=True)
    for text in ("Some CPU", "012345678 with changes beside it", "2026-11-21 10:01 UTC", "torch 2.13.0", "20.0 GB/s"):
        assert text in page
    for text in (
        "1.25 × · 12.5 ms",
        "<td>1.0%</td>",
        "<td>15</td>",
        "<td>80%</td>",
        "<td>0.83</td>",
        "<td>3.00 MiB</td>",
    ):
        assert text in page, text
    classes = [drawing.get("class") for drawing in drawings(page)]
    assert classes.count("wide") == 1 and classes.count("bars") == 1


def test_page_needs_nothing_from_outside(result_file):
    page = page_of(result_file, [entry(name, time) for name, time in PEERS.items()])
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:|src=", page)
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page


def test_names_are_escaped(result_file):
    page = page_of(result_file, [entry("ours", 0.01), entry("<b>&peer", 0.02)])
    assert "<b>&" not in page and "&lt;b&gt;&amp;peer" in page


def test_predictions_show_where_there_are_any(result_file):
    assert "predicted" not in page_of(result_file, [entry("ours", 0.02)])
    page = page_of(result_file, [entry("ours", 0.02, predicted_seconds=0.016), entry("eager", 0.03)])
    assert "<td>16.0 ms</td><td>1.25</td>" in page


def test_the_wall_stands_beside_the_device(result_file):
    """On a CPU they are the same, and stand once."""
    page = page_of(result_file, [entry(name, time) for name, time in PEERS.items()])
    assert "<th>median</th>" in page and "<th>wall</th>" not in page and "idle queue" not in page
    walls = [entry(name, time, wall_seconds=wall) for (name, time), wall in zip(PEERS.items(), (3, 4, 2), strict=True)]
    page = page_of(result_file, walls)
    for text in (
        "<th>device</th>",
        "<th>wall</th><th>wall / limit</th><th>wall / PEFT, defaults</th>",
        "<td>1.25</td><td>0.83</td><td>4.00 s</td><td>1.33</td><td>2.00</td>",
        "1.25 × · 12.5 ms · wall 4.00 s",
        "idle queue",
    ):
        assert text in page, text


def test_an_op_that_only_moves_bytes_has_bars_and_no_point(result_file):
    page = page_of(result_file, [entry("ours", 0.02, flops=0), entry("limit", 0.01, flops=0)])
    assert [drawing.get("class") for drawing in drawings(page)] == ["bars"]


def test_without_limit_and_rates(result_file):
    page = page_of(result_file, [entry("ours", 0.02), entry("eager", 0.01)], rates={})
    assert "over the fastest: no limit was timed" in page and "this run measured no rates" in page
    assert 'class="roof"' not in page


def test_old_files_make_a_page(result_file):
    old = entry("ours", 0.02, group="lora_linear nllb-600m bfloat16")
    for name in ("shape", "case", "dtype", "tokens", "launches", "peak_bytes"):
        del old["extra_info"][name]
    assert "lora_linear nllb-600m bfloat16" in page_of(result_file, [old])


def test_bar_lengths_are_proportional():
    rows = [plots.Bar("limit", 1.0, "", "limit", (1.0, 1.0)), plots.Bar("ours", 2.5, "", "ours", (2.4, 2.6))]
    drawing = ElementTree.fromstring(plots.bars(rows, longest=2.6))
    widths = [float(rect.get("width")) for rect in drawing.iter("rect")]
    assert widths[1] / widths[0] == pytest.approx(2.5, rel=1e-3)
    assert widths[1] < plots.BAR_WIDTH


def test_points_stand_where_the_axes_say():
    points = [plots.Point(10.0, 1e10, "a", "s", "", True), plots.Point(1000.0, 1e12, "b", "s", "", True)]
    drawing = ElementTree.fromstring(plots.roofline(points, ["a", "b"], ["s"], None, None))
    marks = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in drawing.iter("circle")]
    ticks = {text.text: float(text.get("x")) for text in drawing.iter("text")}
    assert [x for x, _ in marks] == pytest.approx([ticks["10"], ticks["1,000"]], abs=0.11)
    assert marks[0][1] > marks[1][1]  # a higher rate is further up


def test_roof_bends_where_the_rates_meet():
    point = plots.Point(1.0, 1e9, "a", "s", "", True)
    drawing = ElementTree.fromstring(plots.roofline([point], ["a"], ["s"], 1e12, 1e10))
    corners = drawing.find("polyline").get("points").split()
    ridge = [float(number) for number in corners[1].split(",")]
    ticks = {text.text: float(text.get("x")) for text in drawing.iter("text")}
    assert ridge[0] == pytest.approx(ticks["100"], abs=0.11)


def test_labels_cover_neither_one_another_nor_marks():
    points = [
        plots.Point(10 ** (2 + n / 40), 10 ** (11 + n % 3 / 20), f"some_op_{n}", "s", "", True) for n in range(14)
    ]
    drawing = ElementTree.fromstring(plots.roofline(points, [p.op for p in points], ["s"], 2e11, 2e10))
    texts = [text for text in drawing.iter("text") if text.get("class", "").startswith("label")]
    boxes = [(float(t.get("x")), float(t.get("y")), 7 * len(t.text)) for t in texts]
    assert len(boxes) == 14
    for (x, y, width), (other_x, other_y, other_width) in itertools.combinations(boxes, 2):
        assert abs(y - other_y) >= 12 or x + width <= other_x or other_x + other_width <= x
    marks = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in drawing.iter("circle")]
    for (x, y, width), (mark_x, mark_y) in itertools.product(boxes, marks):
        assert not (x < mark_x < x + width and y - 9 < mark_y < y)
    assert all(0 < x and x + width < plots.WIDTH and not math.isnan(y) for x, y, width in boxes)
