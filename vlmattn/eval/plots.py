"""Accuracy against visual tokens, as SVG text that can stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#3366aa", "#dd7722", "#339966", "#aa3377", "#887733", "#555555")
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """One method in a plot.

    Attributes:
        label: as in the legend.
        method: what decides the colour, for instance "fastv".
        tokens: visual tokens, mean over layers.
        value: in percent.
        interval: (low, high) in percent, or None.
    """

    label: str
    method: str
    tokens: float
    value: float
    interval: tuple[float, float] | None


def accuracy_plot(graphs: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """One graph per (title, points), side by side, with 95 % intervals as bars; returns an `<svg>` element.

    The same method has the same colour in all graphs, and one legend stands below.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(point.method for _, points in graphs for point in points))
    with rc_context({"svg.hashsalt": "vlmattn", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.0 * len(graphs), 3.9), layout="constrained")
        for axes, (title, points) in zip(figure.subplots(1, len(graphs), squeeze=False)[0], graphs, strict=True):
            _draw(axes, title, points, methods)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _bare(file.getvalue())


def _draw(axes: Any, title: str, points: Sequence[Point], methods: Sequence[str]) -> None:
    for rank, point in enumerate(sorted(points, key=lambda point: (point.tokens, point.value))):
        number = methods.index(point.method)
        error = None
        if point.interval is not None:
            error = [[max(0.0, point.value - point.interval[0])], [max(0.0, point.interval[1] - point.value)]]
        axes.errorbar(
            point.tokens,
            point.value,
            yerr=error,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            capsize=3,
            markersize=7,
            label=point.method,
        )
        axes.annotate(
            point.label,
            (point.tokens, point.value),
            xytext=(7, 7 if rank % 2 else -12),
            textcoords="offset points",
            fontsize=7.5,
            color=COLOURS[number % len(COLOURS)],
        )
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel("visual tokens, mean over layers")
    axes.set_ylabel("%")
    axes.margins(x=0.18, y=0.15)
    axes.grid(alpha=0.25)


def _bare(svg: str) -> str:
    """The <svg> element alone, scaling with the page, without metadata that names other sites."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
