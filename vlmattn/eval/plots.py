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
MARKERS = "os^DvP<X>hp"
"""With six colours, eleven markers: 66 methods in a row of the registry all look different."""
GREY, INK = "#8a8a8a", "#222222"
LABEL_SIZE = 7.5
GAP = np.array([-3.0, 0.0, 3.0, 0.0])
"""What stays free around a label, in points: two labels side by side would read as one."""
ARROWS = {-1: "▾", 1: "▴"}
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
        label: beside the marker, "" for none; only methods have one.
        family: what has one colour and marker, for instance "fastv".
        x: its cost.
        value: in the unit of the axis.
        interval: (low, high) in the same unit, or None.
        role: of the row.
        series: points of one family and series are joined by a line.
        crossed: whether it is crossed out, because the row must not be compared.
    """

    label: str
    family: str
    x: float
    value: float
    interval: tuple[float, float] | None = None
    role: Role = "method"
    series: str = ""
    crossed: bool = False


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

    Methods have a colour and a marker each, given by their place in the registry; their budgets are labelled and joined
    by a line for each layer. Controls are hollow and grey and have no label; rows that must not be compared are crossed
    out; the baseline is a dashed line with its interval as a band. The values of the baseline and the methods decide
    what the upright axis spans; a control beyond it stands at the edge, with an arrow.

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
                label=label if entry.role == "method" else "",
                family=family,
                x=_cost(entry, x),
                value=scale * value,
                interval=None if interval is None else (scale * interval[0], scale * interval[1]),
                role=entry.role,
                series=_series_of(entry),
                crossed=bool(entry.invalid),
            )
        )
    return Graph(name, AXES[x], key if metric is None else title(metric), points)


def families(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(family, label) of each row: the methods' names, and those parameters that differ within the family.

    "fastv(keep=0.5, before_layer=2)" and "fastv(keep=0.25, before_layer=2)" are of the family "fastv", labelled 0.5 and
    0.25: `keep` is always told and needs no name; a layer is "L2". A control that is no method, such as
    "threshold(logit +0.37)", is a family of its own.
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


def _series_of(entry: Row) -> str:
    """All parameters but the budgets: what two rows must share to be joined."""
    return ", ".join(f"{name}={value}" for name, value in _read(entry)[1].items() if not name.endswith("keep"))


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
    return bare(file.getvalue())


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
    points = [point for graph in graphs for point in graph.points]
    labels = [part for point in points for part in point.label.split()]
    told = []
    if any(part[:1].isdecimal() for part in labels):
        told.append("numbers: keep")
    if any(re.fullmatch(r"L\d+", part) for part in labels):
        told.append("L2: from layer 2 on")
    if any(point.crossed for point in points):
        told.append("crossed out: not comparable, see the table")
    if arrows := sorted({arrow for graph in graphs for point in graph.points if (arrow := _beyond(graph, point))}):
        told.append(f"{' '.join(ARROWS[arrow] for arrow in arrows)} at the edge: control beyond the axis")
    return "; ".join(told) or None


def _span(graph: Graph) -> tuple[float, float]:
    """What the upright axis shows: baseline and methods with their intervals, and room; everything without methods."""
    points = graph.points
    if any(point.role == "method" for point in points):
        points = [point for point in points if point.role in ("baseline", "method")]
    ends = [end for point in points for end in (point.value, *(point.interval or ()))]
    if not ends:
        return 0.0, 1.0
    room = 0.12 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    return min(ends) - room, max(ends) + room


def _beyond(graph: Graph, point: Point) -> int:
    """-1 for a point below what the upright axis shows, 1 for one above, 0 for others."""
    low, high = _span(graph)
    return (point.value > high) - (point.value < low)


def _height(graph: Graph, point: Point) -> float:
    """Where a point is drawn: at its value, or just inside the edge that it is beyond."""
    low, high = _span(graph)
    inside = 0.05 * (high - low)
    return {-1: low + inside, 0: point.value, 1: high - inside}[_beyond(graph, point)]


@dataclass(frozen=True)
class _Look:
    name: str
    colour: str
    inside: str
    marker: str
    line: str


def _looks(graphs: Sequence[Graph]) -> dict[tuple[Role, str], _Look]:
    """Colour, marker and line of every family of methods and of controls, by role and family.

    A method has the colour and the marker of its place in the registry, whatever else is drawn. A composition has the
    colour of its first method, the marker of its last and a line of dashes and dots. Controls have markers only. Where
    two would look the same, the later one gets the next marker that is free.
    """
    order = _order()
    found: dict[tuple[Role, str], _Look] = {}
    for role in ("method", "control"):
        names = {point.family for graph in graphs for point in graph.points if point.role == role}
        used: set[tuple[str, str]] = set()
        for family in sorted(names, key=lambda name: (name.count(" + "), order.get(name, len(order)), name)):
            parts = family.split(" + ")
            first, last = (order.get(part, len(order)) for part in (parts[0], parts[-1]))
            colour = COLOURS[first % len(COLOURS)] if role == "method" else GREY
            free = [MARKERS[(last + step) % len(MARKERS)] for step in range(len(MARKERS))]
            marker = next((marker for marker in free if (colour, marker) not in used), free[0])
            used.add((colour, marker))
            if role == "method":
                found["method", family] = _Look(family, colour, colour, marker, "-" if len(parts) == 1 else "-.")
            else:
                found["control", family] = _Look(f"{family} (control)", GREY, "white", marker, "none")
    return found


def _order() -> dict[str, int]:
    """Name of a method -> its place in the registry; a user's own methods come after those of the library."""
    import vlmattn
    from vlmattn import spec

    library = f"{vlmattn.__name__}."
    known = sorted(spec.registry().values(), key=lambda info: not info.cls.__module__.startswith(library))
    return {info.name: place for place, info in enumerate(known)}


def _fill(axes: Axes, graph: Graph, looks: Mapping[tuple[Role, str], _Look]) -> dict[str, Any]:
    """Draw everything but the labels; returns what the legend needs."""
    from matplotlib.markers import CARETDOWN, CARETUP

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
        for mine in _series(graph, role, family):
            for point in mine:
                if point.interval is not None:
                    axes.vlines(point.x, *point.interval, color=look.colour, linewidth=1.1, alpha=0.75, zorder=2)
                if point.crossed:
                    spot = (point.x, _height(graph, point))
                    axes.plot(*spot, marker="x", color=INK, markersize=9, linestyle="none", zorder=4)
            (handles[look.name],) = axes.plot(
                [point.x for point in mine],
                [_height(graph, point) for point in mine],
                marker=look.marker,
                color=look.colour,
                markerfacecolor=look.inside,
                markersize=6.5,
                linestyle=look.line,
                linewidth=1.1,
                zorder=3,
            )
    low, high = _span(graph)
    for arrow, edge, marker in ((-1, low, CARETDOWN), (1, high, CARETUP)):
        if beyond := [point.x for point in graph.points if _beyond(graph, point) == arrow]:
            axes.plot(
                beyond, [edge] * len(beyond), marker=marker, color=GREY, linestyle="none", clip_on=False, zorder=3
            )
    axes.margins(x=0.12)
    axes.set_ylim(low, high)
    return handles


def _series(graph: Graph, role: Role, family: str) -> list[list[Point]]:
    """The points of a family, those that a line joins together, from left to right."""
    mine = [point for point in graph.points if point.role == role and point.family == family]
    return [
        sorted((point for point in mine if point.series == name), key=lambda point: (point.x, point.value))
        for name in dict.fromkeys(point.series for point in mine)
    ]


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
        if not point.label or point.role != "method":
            continue
        measured = axes.text(0, 0, point.label, fontsize=LABEL_SIZE)
        spot, size = _pixels(axes, point.x, point.value), measured.get_window_extent(renderer)
        measured.remove()
        offset, box, away = _place(spot, size, taken, written, room, scale)
        written = np.vstack([written, box + GAP * scale])
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
        x, y = _pixels(axes, point.x, _height(graph, point))
        taken.append((x - 5, y - 5, x + 5, y + 5))
        if point.role == "baseline":
            edges = axes.get_window_extent()
            taken.append((edges.x0, y - 1, edges.x1, y + 1))
        elif point.interval is not None:
            low, high = (_pixels(axes, point.x, end)[1] for end in point.interval)
            taken.append((x - 1.5, low, x + 1.5, high))
    for (role, family), look in looks.items():
        joined = _series(graph, role, family) if look.line != "none" else []
        for first, second in (pair for mine in joined for pair in pairwise(mine)):
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


def bare(svg: str) -> str:
    """The <svg> element alone, scaling with the page, without metadata that names other sites."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
