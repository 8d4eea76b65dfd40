"""Accuracy against cost, as SVG text that can stand inside a page."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmattn.eval.summary import Role, Row, metrics, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's palette without yellow: apart for colour-blind readers; in grey print the markers tell.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX<>"
GREY, INK = "#8a8a8a", "#222222"
LABEL_SIZE = 7.5
Boxes = NDArray[np.float64]
"""(N, 4) or (4,): left, bottom, right, top in pixels."""
Measure = Literal["measured", "macs", "tokens"]
AXES = {
    "measured": "ms per question, prefill and decoding",
    "macs": "prefill MACs of the decoder, % of unpruned",
    "tokens": "visual tokens, mean over layers",
}


@dataclass(frozen=True)
class Point:
    """One row in a graph.

    Attributes:
        label: beside the marker, "" for none.
        family: what has one colour and one line, for instance "fastv".
        x: its cost.
        value: in the unit of the axis.
        interval: (low, high) in the same unit, or None.
        role: of the row.
    """

    label: str
    family: str
    x: float
    value: float
    interval: tuple[float, float] | None = None
    role: Role = "method"


@dataclass(frozen=True)
class Graph:
    """One pair of axes.

    Attributes:
        title: above it.
        across, up: what the axes are.
        points: what is drawn; at most one "baseline".
    """

    title: str
    across: str
    up: str
    points: Sequence[Point]


def tradeoff(rows: Sequence[Row], keys: Sequence[str] = (), x: Sequence[Measure] = ("measured", "macs")) -> str:
    """Metrics of a sweep against its costs: a row of graphs per metric, a column per cost; an `<svg>` element.

    Methods have a colour and a marker each, their budgets are joined by a line; controls are hollow and grey, rows that
    must not be compared are crossed out, the baseline is a dashed line with its interval as a band.

    Args:
        rows: of the sweep; those without numbers are left out.
        keys: metrics; if empty two headlines: aggregates if there are any, about different questions if possible.
        x: costs: "measured" time of a question in ms, "macs" as a share of the unpruned, or "tokens" a layer.
    """
    chosen = tuple(keys) or _headlines(rows)
    return draw([graph(rows, key, measure) for key in chosen for measure in x], columns=len(x))


def graph(rows: Sequence[Row], key: str, x: Measure, name: str = "") -> Graph:
    """The graph of one metric over one cost, under the title `name`."""
    metric = next((metric for metric in metrics(rows) if metric.key == key), None)
    scale = 100.0 if metric is None or metric.percent else 1.0
    shown = [entry for entry in rows if entry.value(key) is not None and entry.cost.get("questions")]
    points = []
    for entry, (family, label) in zip(shown, families(shown), strict=True):
        interval, value = entry.intervals.get(key), entry.value(key)
        assert value is not None
        points.append(
            Point(
                label=f"{label} †".strip() if entry.invalid else label,
                family=family,
                x=_cost(entry, x),
                value=scale * value,
                interval=None if interval is None else (scale * interval[0], scale * interval[1]),
                role=entry.role,
            )
        )
    return Graph(name, AXES[x], key if metric is None else title(metric), points)


def families(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(family, label) of each row: the methods' names, and those parameters that differ within the family.

    "fastv(keep=0.5, before_layer=2)" and "fastv(keep=0.25, before_layer=2)" are of the family "fastv", labelled 0.5 and
    0.25: `keep` is always told and needs no name; a layer is "L2". A control that is no method, such as
    "threshold(+0.37)", is a family of its own.
    """
    read = [_read(entry) for entry in rows]
    told: dict[str, list[Mapping[str, str]]] = {}
    for family, values in read:
        told.setdefault(family, []).append(values)
    found = []
    for family, values in read:
        differ = [name for name, value in values.items() if any(other.get(name) != value for other in told[family])]
        shown = [name for name in values if name in differ or name.endswith("keep") or not name]
        found.append((family, " ".join(_told(name, values[name]) for name in shown)))
    return found


def _told(name: str, value: str) -> str:
    """A parameter as a label has it."""
    if name.endswith("before_layer"):
        return "default layer" if value == "None" else f"L{value}"
    return value if name.endswith("keep") or not name else f"{name}={value}"


def draw(graphs: Sequence[Graph], columns: int = 2) -> str:
    """The graphs in a grid, one legend below; the same family looks the same in all. Returns an `<svg>` element."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "vlmattn"}):
        figure(graphs, columns).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _bare(file.getvalue())


def figure(graphs: Sequence[Graph], columns: int = 2) -> Figure:
    """The same as a matplotlib figure, to be saved in another format."""
    from matplotlib import rc_context

    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        return _figure(graphs, max(1, min(columns, len(graphs))))


def _figure(graphs: Sequence[Graph], columns: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = max(1, -(-len(graphs) // columns))
    looks = _looks(graphs)
    whole = Figure(figsize=(5.2 * columns, 3.6 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(whole)  # measures texts
    handles: dict[str, Any] = {}
    grid = whole.subplots(lines, columns, squeeze=False).ravel()
    for axes, graph in zip(grid, graphs):
        handles |= _fill(axes, graph, looks)
    for axes in grid[len(graphs) :]:
        axes.set_axis_off()
    if handles:
        whole.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=-(-len(handles) // -(-len(handles) // (3 * columns))),  # rows of about equal length
            frameon=False,
            fontsize=9,
            title=_legend_title(graphs),
            title_fontsize=8,
        )
    whole.draw_without_rendering()
    whole.set_layout_engine("none")  # what is placed by pixels stays where it was measured
    for axes, graph in zip(grid, graphs):
        _write_labels(axes, graph, looks)
    return whole


def _legend_title(graphs: Sequence[Graph]) -> str | None:
    """What the labels say, as far as there are any."""
    labels = [part for graph in graphs for point in graph.points for part in point.label.split()]
    told = []
    if any(part[:1].isdecimal() for part in labels):
        told.append("numbers: visual tokens kept")
    if any(re.fullmatch(r"L\d+", part) for part in labels):
        told.append("L2: from layer 2 on")
    if "†" in labels:
        told.append("† not comparable, see the table")
    return "; ".join(told) or None


@dataclass(frozen=True)
class _Look:
    name: str
    colour: str
    inside: str
    marker: str
    line: str


def _looks(graphs: Sequence[Graph]) -> dict[tuple[Role, str], _Look]:
    """Colour, marker and line of every family of methods and of controls, by role and family."""
    found: dict[tuple[Role, str], _Look] = {}
    for role in ("method", "control"):
        names = dict.fromkeys(point.family for graph in graphs for point in graph.points if point.role == role)
        for number, family in enumerate(names):
            marker = MARKERS[number % len(MARKERS)]
            colour = COLOURS[number % len(COLOURS)]
            if role == "method":
                found["method", family] = _Look(family, colour, colour, marker, "-")
            else:
                found["control", family] = _Look(f"{family} (control)", GREY, "white", marker, "none")
    return found


def _fill(axes: Axes, graph: Graph, looks: Mapping[tuple[Role, str], _Look]) -> dict[str, Any]:
    """Draw everything but the labels; returns what the legend needs."""
    handles: dict[str, Any] = {}
    axes.set_title(graph.title, fontsize=10.5, loc="left")
    axes.set_xlabel(graph.across)
    axes.set_ylabel(graph.up)
    axes.grid(alpha=0.2)
    for point in graph.points:
        if point.role != "baseline":
            continue
        if point.interval is not None:
            axes.axhspan(*point.interval, color=INK, alpha=0.08, linewidth=0, zorder=0.5)
        axes.plot(point.x, point.value, marker="*", color=INK, markersize=10, linestyle="none", zorder=3)
        handles[point.family] = axes.axhline(point.value, color=INK, linestyle="--", linewidth=1.1, zorder=1.5)
    for (role, family), look in looks.items():
        mine = _series(graph, role, family)
        if not mine:
            continue
        for point in mine:
            if point.interval is not None:
                axes.vlines(point.x, *point.interval, color=look.colour, linewidth=1.1, alpha=0.75, zorder=2)
            if point.label.endswith("†"):
                axes.plot(point.x, point.value, marker="x", color=INK, markersize=9, linestyle="none", zorder=4)
        (handles[look.name],) = axes.plot(
            [point.x for point in mine],
            [point.value for point in mine],
            marker=look.marker,
            color=look.colour,
            markerfacecolor=look.inside,
            markersize=6.5,
            linestyle=look.line,
            linewidth=1.1,
            zorder=3,
        )
    axes.margins(x=0.12, y=0.12)
    return handles


def _series(graph: Graph, role: Role, family: str) -> list[Point]:
    mine = [point for point in graph.points if point.role == role and point.family == family]
    return sorted(mine, key=lambda point: (point.x, point.value))


def _write_labels(axes: Axes, graph: Graph, looks: Mapping[tuple[Role, str], _Look]) -> None:
    """Labels beside their points, each at the place around it that covers least of what is there already."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb

    figure = axes.get_figure(root=True)
    assert figure is not None and isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()
    room, scale = axes.get_window_extent(renderer), figure.dpi / 72  # offsets are in points, extents in pixels
    taken, written = _occupied(axes, graph, looks), np.empty((0, 4))
    for point in sorted(graph.points, key=lambda point: (point.x, point.value)):
        if not point.label or point.role == "baseline":
            continue
        measured = axes.text(0, 0, point.label, fontsize=LABEL_SIZE)
        spot, size = _pixels(axes, point.x, point.value), measured.get_window_extent(renderer)
        measured.remove()
        offset, box, away = _place(spot, size, taken, written, room, scale)
        written = np.vstack([written, box])
        dark = tuple(0.7 * part for part in to_rgb(looks[point.role, point.family].colour))
        axes.annotate(
            point.label,
            (point.x, point.value),
            offset,
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            color=dark,
            arrowprops={"arrowstyle": "-", "color": dark, "linewidth": 0.5, "shrinkA": 0} if away > 12 else None,
        )


def _occupied(axes: Axes, graph: Graph, looks: Mapping[tuple[Role, str], _Look]) -> Boxes:
    """What labels should not cover: markers, interval bars, lines between budgets and the baseline."""
    taken = []
    for point in graph.points:
        x, y = _pixels(axes, point.x, point.value)
        taken.append((x - 5, y - 5, x + 5, y + 5))
        if point.role == "baseline":
            edges = axes.get_window_extent()
            taken.append((edges.x0, y - 1, edges.x1, y + 1))
        elif point.interval is not None:
            low, high = (_pixels(axes, point.x, end)[1] for end in point.interval)
            taken.append((x - 1.5, low, x + 1.5, high))
    for (role, family), look in looks.items():
        mine = _series(graph, role, family) if look.line != "none" else []
        for first, second in pairwise(mine):
            start, end = _pixels(axes, first.x, first.value), _pixels(axes, second.x, second.value)
            for step in np.linspace(0, 1, 2 + int(max(abs(end - start)) / 4)):
                x, y = start + (end - start) * step
                taken.append((x - 2, y - 2, x + 2, y + 2))
    return np.array(taken).reshape(-1, 4)


def _pixels(axes: Axes, x: float, y: float) -> Boxes:
    """(2,) where a point lies."""
    return np.asarray(axes.transData.transform((x, y)))


def _place(
    spot: Boxes, size: Bbox, taken: Boxes, written: Boxes, room: Bbox, scale: float
) -> tuple[tuple[float, float], Boxes, int]:
    """Where a text of that size goes: nearest to its spot first, until nothing is covered.

    Returns:
        Its offset in points, its box in pixels, and how many points it stands off.
    """
    wide, high = size.width / scale, size.height / scale
    area, inside = size.width * size.height, np.array([room.extents])
    found = []
    for away in (6, 11, 17, 24, 34, 46):
        for across, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            left = {1: away, 0: -wide / 2, -1: -wide - away}[across]
            bottom = {1: away * 0.6, 0: -high / 2, -1: -high - away * 0.6}[up]
            if not across:
                bottom += up * (away + high) / 2
            x, y = spot[0] + left * scale, spot[1] + bottom * scale
            box = np.array([x, y, x + size.width, y + size.height])
            # A text on a line can still be read; two texts on each other, or one beyond the edge, cannot.
            lost = area - _common(box, inside) + _common(box, written)
            covered = _common(box, taken) + 10 * lost
            if covered < 0.01:
                return (left, bottom), box, away
            found.append((covered, away, (left, bottom), box))
    _, away, offset, box = min(found, key=lambda place: place[:2])
    return offset, box, away


def _common(box: Boxes, others: Boxes) -> float:
    """Pixels that a box shares with others, added up."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.maximum(sides, 0).prod(axis=1).sum())


def _headlines(rows: Sequence[Row]) -> tuple[str, ...]:
    """Two metrics to draw: aggregates before tasks, and about different questions if possible."""
    found = [metric for metric in metrics(rows, headline=True) if metric.better != "neither"]
    found = [metric for metric in found if not metric.group] or found
    others = [metric for metric in found[1:] if not set(metric.groups) & set(found[0].groups)] or found[1:]
    return tuple(metric.key for metric in (*found[:1], *others[:1]))


def _cost(entry: Row, x: Measure) -> float:
    if x == "macs":
        return 100 * float(entry.cost["prefill_macs_ratio"])
    return float(entry.cost["ms_per_question" if x == "measured" else "average_visual_tokens"])


def _read(entry: Row) -> tuple[str, Mapping[str, str]]:
    """("fastv + var", {"keep": "0.5", ...}): names of the methods of a row and all their parameters."""
    from vlmattn import spec
    from vlmattn.errors import VlmattnError

    for text in dict.fromkeys((entry.label, entry.spec)):
        try:
            methods = spec.parse(text)
        except VlmattnError:
            if entry.role == "control":  # known by its label: its spec is that of the baseline
                family, _, inside = text.partition("(")
                return family, {"": inside.rstrip(")")}
            continue
        values: dict[str, str] = {}
        for number, method in enumerate(methods):
            again = method.name in [other.name for other in methods[:number]]
            prefix = "" if len(methods) == 1 else f"{method.name}[{number}]." if again else f"{method.name}."
            for field in dataclasses.fields(method):
                values[prefix + field.name] = f"{getattr(method, field.name)}"
        return " + ".join(method.name for method in methods) or "none", values
    return entry.label, {}


def _bare(svg: str) -> str:
    """The <svg> element alone, scaling with the page, without metadata that names other sites."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
