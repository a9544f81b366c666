"""The plot of a study."""

from __future__ import annotations

import os
from collections.abc import Sequence

from petl_kernels.files import atomic_path

from .rows import PARENT, Row


def plot(rows: Sequence[Row], path: str | os.PathLike, heading: str) -> None:
    """Draws BLEU against the share of parameters that is trained, one line a method, as the PNG file ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: matplotlib takes a second to load
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    done = [(row, row.scores.bleu) for row in rows if row.status == "done" and row.scores is not None]
    for row, bleu in done:
        if row.method in ("full", PARENT):
            style = ("--", "full fine-tuning") if row.method == "full" else (":", PARENT)
            axes.axhline(bleu, color="0.35", linestyle=style[0], linewidth=1.2, label=style[1])
    methods = dict.fromkeys(row.method for row, _ in done if row.method not in ("full", PARENT))
    for method, marker in zip(methods, "osD^vP*Xh<>p" * len(methods), strict=False):
        own = [(row.trained_share, bleu) for row, bleu in done if row.method == method]
        points = sorted((100 * share, bleu) for share, bleu in own if share is not None)
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=6, linewidth=1.6, label=method)
    if methods:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel("trained parameters, share of the model")
    axes.set_ylabel("BLEU")
    axes.set_title(heading, fontsize=10)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
