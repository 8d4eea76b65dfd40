"""The plot of accuracy against cost: what is drawn, and that texts do not lie on each other."""

from __future__ import annotations

import dataclasses
import re
from itertools import combinations, product
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.text import Annotation, Text
from rows import metric, row, sweep

from vlmattn import spec
from vlmattn.eval import plots
from vlmattn.eval.summary import Row
from vlmattn.methods import base


def shown(svg: str) -> str:
    """The texts of a plot; matplotlib writes each as a comment beside its outlines."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg))


def test_it_is_one_svg_element_the_same_every_time() -> None:
    first, second = plots.tradeoff(sweep()), plots.tradeoff(sweep())
    assert first == second
    assert first.startswith("<svg") and "<metadata" not in first and "<?xml" not in first
    assert re.match(r"<svg[^>]*viewBox", first) and not re.match(r"<svg[^>]* width=", first)
    ElementTree.fromstring(first)


def test_headlines_stand_against_measured_cost_and_macs() -> None:
    text = shown(plots.tradeoff(sweep()))
    assert text.count("accuracy %") == text.count("F1 %") == 2 and "color" not in text
    assert text.count("ms per question") == text.count("prefill MACs") == 2
    assert "noimage (control)" in text and "fastv + var" in text
    text = shown(plots.tradeoff(sweep(), ["caption.length"], x=["tokens"]))
    assert "caption length" in text and "visual tokens, mean over layers" in text and "MACs" not in text


def test_points_carry_value_interval_and_cost_in_the_units_of_the_axes() -> None:
    graph = plots.graph(sweep(), "mean_accuracy", "macs")
    point = next(point for point in graph.points if point.family == "fastv" and point.label == "0.25")
    assert point.value == pytest.approx(79) and point.interval == pytest.approx((76, 81.5))
    assert point.x == pytest.approx(100 * 106 / 160) and point.role == "method"
    assert {point.x for point in plots.graph(sweep(), "mean_f1", "measured").points} >= {9.1, 7.2}
    assert [point.crossed for point in graph.points].count(True) == 1
    assert plots.graph(sweep(), "caption.length", "tokens").points[0].value == 38.24  # no percentage


def test_families_are_method_names_and_labels_what_differs() -> None:
    specs = [
        "none",
        "fastv",
        "fastv(keep=0.25, before_layer=2)",
        "fastv(keep=0.5) + var",
        "uniform(keep=64)",
        "random(before_layer=1)",
        "random(before_layer=1, seed=3)",
        "random + random(keep=0.25, before_layer=2)",
    ]
    rows = [row(spec, 0.5, 72, 4.0) for spec in specs]
    assert plots.families(rows) == [
        ("none", ""),
        ("fastv", "0.5 default layer"),
        ("fastv", "0.25 L2"),
        ("fastv + var", "0.5"),
        ("uniform", "64"),
        ("random", "0.5 seed=0"),
        ("random", "0.5 seed=3"),
        ("random + random", "0.5 0.25"),
    ]
    named = dataclasses.replace(rows[2], label="FastV, a quarter")
    moved = row("threshold(logit +0.37)", 0.5, 144, 9.0, "control", spec="none")
    assert plots.families([named, moved])[0] == ("fastv", "0.25")
    assert plots.families([named, moved])[1][0] == "threshold"
    assert plots.families([row("x", 0.5, 72, 4.0, spec="gone(keep=1)")]) == [("x", "")]


def test_budgets_are_joined_controls_are_hollow_and_the_baseline_is_a_band() -> None:
    figure = plots.figure([plots.graph(sweep(), "mean_accuracy", "macs")])
    (axes,) = figure.axes
    looks = [
        (to_hex(line.get_color()), line.get_markerfacecolor(), line.get_linestyle())
        for line in axes.lines
        if line.get_markerfacecolor() == "white"
    ]
    assert len(looks) == 3 and {look[0] for look in looks} == {plots.GREY} and {look[2] for look in looks} == {"None"}
    joined = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert len(joined) == 2  # fastv and uniform at two budgets each
    assert any(line.get_linestyle() == "--" for line in axes.lines)
    assert len(axes.patches) == 1  # the band
    bars = [entry for entry in axes.collections if isinstance(entry, LineCollection)]
    assert len(bars) == len(sweep()) - 1
    assert sum(line.get_marker() == "x" for line in axes.lines) == 1  # the row that must not be compared
    colours = {to_hex(line.get_color()) for line in joined}
    assert len(colours) == 2 and colours <= set(plots.COLOURS)


def look(rows: list[Row], family: str) -> tuple[Any, ...]:
    """Colour, marker and line of a family in the legend of its own plot."""
    figure = plots.figure([plots.graph(rows, "mean_f1", "macs")])
    legend = figure.legends[0]
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    line: Any = handles[family]
    return to_hex(line.get_color()), line.get_marker(), line.get_linestyle()


def test_a_method_looks_the_same_whatever_else_is_drawn() -> None:
    rows = sweep()
    spread, fastv = row("uniform(keep=0.25)", 0.7, 36, 4.0), row("fastv(keep=0.5)", 0.8, 72, 5.0)
    looks = {look(some, "uniform") for some in (rows, rows[::-1], [spread], [spread, fastv], [fastv, spread], rows[3:])}
    assert len(looks) == 1
    names = list(spec.registry())
    drawn = [look([row(name, 0.7, 36, 4.0)], name) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn[names.index("uniform")] == looks.pop()


def test_methods_of_a_user_do_not_change_how_those_of_the_library_look(monkeypatch: pytest.MonkeyPatch) -> None:
    before = look([row("uniform", 0.7, 36, 4.0)], "uniform")
    mine = type("Mine", (base.REGISTRY["fastv"],), {"name": "a_first", "__module__": "mine"})
    monkeypatch.setitem(base.REGISTRY, "a_first", mine)
    assert next(iter(plots._order())) != "a_first" and list(plots._order())[-1] == "a_first"
    assert look([row("uniform", 0.7, 36, 4.0)], "uniform") == before


def test_a_composition_has_the_colour_of_its_first_method_and_a_line_of_its_own() -> None:
    rows = [row("none", 0.9, 144, 9.0, "baseline")]
    for keep, more in product((0.25, 0.5), ("", " + var", " + vhr")):
        rows.append(row(f"fastv(keep={keep}){more}", 0.8 + keep / 10, 144 * keep, 5 + keep))
    alone, first, second = (look(rows, name) for name in ("fastv", "fastv + var", "fastv + vhr"))
    assert alone[0] == first[0] == second[0]
    assert len({alone[1], first[1], second[1]}) == 3
    assert alone[2] == "-" and first[2] == second[2] == "-."


def test_lines_join_budgets_at_one_layer() -> None:
    rows = [row("none", 0.9, 144, 9.0, "baseline")]
    for layer, keep in product((1, 2, 3), (0.25, 0.5)):
        rows.append(row(f"fastv(keep={keep}, before_layer={layer})", 0.7 + keep / 10, 36 * layer + 40 * keep, 5 + keep))
    (axes,) = plots.figure([plots.graph(rows, "mean_f1", "macs")]).axes
    joined = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [len(np.atleast_1d(line.get_xdata())) for line in joined] == [2, 2, 2]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in joined}) == 1
    assert "0.25 L1" in [text.get_text() for text in axes.texts]


def test_methods_are_labelled_and_controls_are_not() -> None:
    graph = plots.graph(sweep(), "mean_accuracy", "macs")
    (axes,) = plots.figure([graph]).axes
    labels = [text.get_text() for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(labels) == ["0.25", "0.25", "0.5", "0.5", "0.5"]
    text = shown(plots.tradeoff(sweep()))
    assert "0.37" not in text and "threshold (control)" in text
    assert "numbers: keep;" in text and "crossed out: not comparable" in text


def test_the_axis_spans_methods_and_a_control_beyond_it_stands_at_the_edge() -> None:
    graph = plots.graph(sweep(), "mean_accuracy", "macs")
    figure = plots.figure([graph])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    ends = [end for point in graph.points if point.role != "control" for end in point.interval or ()]
    assert low < min(ends) and max(ends) < high
    assert high - low == pytest.approx(1.24 * (max(ends) - min(ends)))
    (lost,) = (point for point in graph.points if point.value < low)
    assert lost.family == "noimage"  # 50, without a method below 71
    points = [np.asarray(line.get_xydata())[0] for line in axes.lines if line.get_markerfacecolor() == "white"]
    (edge,) = (y for x, y in points if x == lost.x and y < 0.1 * high + 0.9 * low)
    assert low < edge
    (arrow,) = (line for line in axes.lines if line.get_marker() == CARETDOWN)
    assert list(arrow.get_xdata()) == [lost.x] and list(arrow.get_ydata()) == [low]  # type: ignore[arg-type]
    assert "▾ at the edge" in figure.legends[0].get_title().get_text()
    inside = plots.figure([plots.graph(sweep()[:-2], "mean_accuracy", "macs")])
    assert "edge" not in inside.legends[0].get_title().get_text()


def test_a_control_above_the_axis_has_an_arrow_up_and_controls_alone_span_it() -> None:
    rows = [
        row("none", 0.5, 144, 9.0, "baseline"),
        row("fastv", 0.45, 72, 5.0),
        row("random", 0.9, 72, 5.0, "control"),
    ]
    (axes,) = plots.figure([plots.graph(rows, "mean_accuracy", "macs")]).axes
    assert axes.get_ylim()[1] < 60 and [line.get_marker() for line in axes.lines].count(CARETUP) == 1
    assert "▴ at the edge" in shown(plots.tradeoff(rows))
    (axes,) = plots.figure([plots.graph([rows[0], rows[2]], "mean_accuracy", "macs")]).axes
    assert axes.get_ylim()[1] > 92.5 and CARETUP not in [line.get_marker() for line in axes.lines]
    alone = dataclasses.replace(rows[1], intervals={})
    (axes,) = plots.figure([plots.graph([alone], "mean_accuracy", "macs")]).axes
    assert axes.get_ylim()[0] < 45 < axes.get_ylim()[1]


def test_labels_do_not_lie_on_each_other() -> None:
    crowd = [row("none", 0.9, 144, 9.0, "baseline")]
    for keep in range(16, 144, 16):
        crowd.append(row(f"fastv(keep={keep})", 0.8 + keep / 2000, keep, 5 + keep / 40))
        crowd.append(row(f"uniform(keep={keep})", 0.8 + keep / 2100, keep, 5 + keep / 38))
        crowd.append(row(f"random(keep={keep})", 0.8 + keep / 2200, keep, 5 + keep / 39, "control"))
    figure = plots.figure([plots.graph(crowd, "mean_accuracy", x) for x in ("measured", "macs")])
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text, renderer) for text in axes.texts if isinstance(text, Annotation)]
        assert len(boxes) == 16
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_labels_side_by_side_keep_a_gap() -> None:
    """Thirteen labels just fit on one line, if the next may begin where one ends."""
    points = [plots.Point("0.5 L2", "fastv", 3.0 * number, 1.0, series=str(number)) for number in range(13)]
    figure = plots.figure([plots.Graph("", "", "", points)], columns=1)
    figure.draw_without_rendering()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72  # type: ignore[attr-defined]
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    assert len(boxes) == 13
    for first, second in combinations(boxes, 2):
        apart = max(first.x0 - second.x1, second.x0 - first.x1)
        assert apart > 2.9 * scale or first.y0 >= second.y1 or second.y0 >= first.y1


def test_rows_without_numbers_are_left_out_and_an_empty_sweep_is_drawn() -> None:
    lost = dataclasses.replace(sweep()[1], cost={"questions": 0})
    assert len(plots.graph([*sweep(), lost], "mean_f1", "macs").points) == len(sweep())
    assert plots.tradeoff([lost]).startswith("<svg")
    assert plots.tradeoff([]).startswith("<svg")
    alone = [row("none", 0.9, 144, 9.0, "baseline", intervals={})]
    assert "none" in shown(plots.tradeoff(alone))


def test_a_benchmark_without_aggregates_shows_its_tasks() -> None:
    rows = sweep()
    tasks = tuple(metric for metric in rows[0].metrics if metric.group)
    rows = [dataclasses.replace(entry, metrics=tasks) for entry in rows]
    text = shown(plots.tradeoff(rows))
    assert "color accuracy %" in text and "count accuracy %" in text and "digits accuracy %" not in text


def test_the_second_metric_is_about_other_questions_if_there_is_one() -> None:
    rows = sweep()
    exact = dataclasses.replace(metric("mean_accuracy"), key="digits.accuracy", title="exact", groups=("digits",))
    told = (metric("mean_accuracy"), metric("mean_f1"), exact)
    text = shown(plots.tradeoff([dataclasses.replace(entry, metrics=told) for entry in rows]))
    assert text.count("exact %") == 2 and "F1 %" not in text
