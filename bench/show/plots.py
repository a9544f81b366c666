"""The two plots of the report as SVG text. Colours are classes: the page's style sets them, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 20, 56
GLYPH, LINE = 7.8, 15  # width of a character and height of a line of the 12-pixel labels
BAR_WIDTH, ROW = 380, 34
NAME_LENGTH = 24
MARKERS = ("circle", "square", "diamond", "triangle", "down", "cross")
HUES = 12


@dataclass(frozen=True)
class Point:
    """A mark of the roofline plot: operations a byte, operations a second; ``note`` shows under the pointer."""

    intensity: float
    rate: float
    op: str
    shape: str
    note: str
    ours: bool


@dataclass(frozen=True)
class Bar:
    """A bar of ``length``, with ``quartiles`` on the same axis; ``kind`` is "limit", "ours" or "peer"."""

    name: str
    length: float
    text: str
    kind: str
    quartiles: tuple[float, float]


def roofline(
    points: Sequence[Point], ops: Sequence[str], shapes: Sequence[str], matmul: float | None, copy: float | None
) -> str:
    """Log-log: each op's operations a second over its operations a byte, under the measured roof (where there is one).

    ``ops`` and ``shapes`` give each its colour and its mark, the same in every plot that gets the same lists.
    Ours are full marks in the colour of their op, with a label for those that lie together; peers are small and pale.
    """
    axes = _Axes.around(points, matmul, copy)
    roof = _roof(axes, matmul, copy)
    parts = [axes.grid(), _line(roof)]
    for point in sorted(points, key=lambda p: p.ours):
        css = f"mark hue{ops.index(point.op) % HUES}" if point.ours else "mark pale"
        mark = _mark(MARKERS[shapes.index(point.shape) % len(MARKERS)], *axes.at(point), 5.5 if point.ours else 3.5)
        parts.append(f'<g class="{css}"><title>{escape(point.note)}</title>{mark}</g>')
    labels = _Labels([*map(axes.at, points), *_along(roof)])
    for number, op in enumerate(ops):
        for group in _together([axes.at(point) for point in points if point.op == op and point.ours]):
            parts.append(labels.place(op, group, f"hue{number % HUES}"))
    return _svg(WIDTH, HEIGHT, "roofline: operations a second over operations a byte", parts, "wide")


def marker_legend(shapes: Sequence[str]) -> str:
    """Draws which mark stands for which shape, in the order of ``roofline``."""
    entries = []
    for number, shape in enumerate(shapes):
        mark = _mark(MARKERS[number % len(MARKERS)], 8, 8, 5.5)
        entries.append(f'<span><svg width="16" height="16" class="mark">{mark}</svg> {escape(shape)}</span>')
    return f'<p class="legend">{" ".join(entries)}</p>'


def bars(rows: Sequence[Bar], longest: float) -> str:
    """Draws a bar for each implementation, with name and figures; dashed: the limit's 1. ``longest`` ends the axis."""
    scale = (BAR_WIDTH - 2) / longest
    parts = []
    for number, row in enumerate(rows):
        y = number * ROW
        name = row.name if len(row.name) <= NAME_LENGTH else row.name[: NAME_LENGTH - 1] + "…"
        low, high = (min(q, longest) * scale for q in row.quartiles)
        parts.append(
            f'<g class="bar {row.kind}"><title>{escape(f"{row.name}: {row.text}")}</title>'
            f'<text x="0" y="{y + 14}">{escape(name)}</text>'
            f'<text x="{BAR_WIDTH}" y="{y + 14}" text-anchor="end">{escape(row.text)}</text>'
            f'<rect x="0" y="{y + 19}" width="{max(row.length * scale, 1):.1f}" height="9" rx="1.5"/>'
            f'<line class="quartiles" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 23.5}" y2="{y + 23.5}"/>'
            f'<line class="one" x1="{scale:.1f}" x2="{scale:.1f}" y1="{y + 17}" y2="{y + 30}"/></g>'
        )
    return _svg(BAR_WIDTH, len(rows) * ROW, "time over the limit", parts, "bars")


@dataclass(frozen=True)
class _Axes:
    """Two logarithmic axes of whole decades; ``low`` and ``high`` are exponents of (x, y)."""

    low: tuple[int, int]
    high: tuple[int, int]

    @classmethod
    def around(cls, points: Iterable[Point], matmul: float | None, copy: float | None) -> _Axes:
        across = [point.intensity for point in points]
        up = [point.rate for point in points] + ([matmul] if matmul else [])
        if matmul and copy:
            across.append(matmul / copy)
        (left, right), (bottom, top) = _decades(across), _decades(up)
        return cls((left, bottom), (right, top))

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.low[0]) / (self.high[0] - self.low[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.low[1]) / (self.high[1] - self.low[1])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def at(self, point: Point) -> tuple[float, float]:
        return self.x(point.intensity), self.y(point.rate)

    def grid(self) -> str:
        parts = []
        for power in range(self.low[0], self.high[0] + 1):
            x = self.x(10.0**power)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_power(power)}</text>')
        for power in range(self.low[1], self.high[1] + 1):
            y = self.y(10.0**power)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_flop_rate(power)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">operations per byte (FLOP/B)</text>')
        return "".join(parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of ten around the values with some room beside them, two decades at least."""
    high = math.ceil(math.log10(max(values) * 1.3))
    return min(math.floor(math.log10(min(values) / 1.3)), high - 2), high


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:g}"


def _flop_rate(exponent: int) -> str:
    prefix = min(max(exponent // 3, 0), 5)
    return f"{10 ** (exponent - 3 * prefix):g} {('', 'k', 'M', 'G', 'T', 'P')[prefix]}FLOP/s"


def _roof(axes: _Axes, matmul: float | None, copy: float | None) -> list[tuple[float, float]]:
    """Corners of the roof in pixels: the slope of the copy rate up to the ridge, then the matmul rate."""
    if not (matmul and copy):
        return []
    # The slope starts where it enters the plot: at its left or its lower edge.
    start = max(10.0 ** axes.low[0], 10.0 ** axes.low[1] / copy)
    corners = [(start, start * copy), (matmul / copy, matmul), (10.0 ** axes.high[0], matmul)]
    return [(axes.x(intensity), axes.y(rate)) for intensity, rate in corners]


def _line(corners: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polyline class="roof" points="{path}"><title>measured roof</title></polyline>' if corners else ""


def _along(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on the line through ``corners``, close enough to one another that no label fits between."""
    steps = [n / 60 for n in range(61)]
    ends = zip(corners, corners[1:], strict=False)
    return [(a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1])) for a, b in ends for s in steps]


def _mark(name: str, x: float, y: float, r: float) -> str:
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        "down": ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
        "cross": ((-0.4, -1.3), (0.4, -1.3), (0.4, 1.3), (-0.4, 1.3)),
    }[name]
    return '<polygon points="{}"/>'.format(" ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners))


class _Labels:
    """Puts each label where it covers no mark, no line and no earlier label; a thin line joins it to a far mark."""

    def __init__(self, taken: Iterable[tuple[float, float]]) -> None:
        self.taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in taken]

    def place(self, text: str, marks: Sequence[tuple[float, float]], css: str) -> str:
        width = GLYPH * len(text) + 4
        for distance in range(10, 400, 6):
            for x, y in marks:
                for angle in range(0, 360, 30):
                    box = _box(x, y, distance, math.radians(angle), width)
                    if self._free(box):
                        self.taken.append(box)
                        return _label(text, x, y, box, distance, css)
        x, y = marks[0]
        return _label(text, x, y, _box(x, y, 10, 0.0, width), 10, css)

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        inside = box[0] > LEFT and box[2] < WIDTH - RIGHT + 12 and box[1] > TOP and box[3] < HEIGHT - BOTTOM
        return inside and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in self.taken
        )


def _together(marks: Iterable[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Marks in groups, each within 140 pixels of the group's first."""
    groups: list[list[tuple[float, float]]] = []
    for mark in sorted(marks):
        near = next((group for group in groups if math.dist(group[0], mark) < 140), None)
        if near is None:
            groups.append([mark])
        else:
            near.append(mark)
    return groups


def _box(x: float, y: float, distance: float, angle: float, width: float) -> tuple[float, float, float, float]:
    """The label's box at ``distance`` from a mark: left of it, right of it or centred, by the angle."""
    cx, cy = x + distance * math.cos(angle), y - distance * math.sin(angle)
    left = cx if math.cos(angle) > 0.3 else cx - width if math.cos(angle) < -0.3 else cx - width / 2
    return left, cy - LINE / 2, left + width, cy + LINE / 2


def _label(text: str, x: float, y: float, box: tuple, distance: float, css: str) -> str:
    lead = ""
    if distance > 14:
        end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        lead = f'<line class="lead {css}" x1="{x:.1f}" y1="{y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
    return f'{lead}<text class="label {css}" x="{box[0] + 2:.1f}" y="{box[3] - 4:.1f}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Iterable[str], css: str) -> str:
    body = "\n".join(parts)
    return f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">\n{body}\n</svg>'
