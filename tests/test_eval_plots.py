"""The plot of accuracy against cost: what is drawn, and that texts do not lie on each other."""

from __future__ import annotations

import dataclasses
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.text import Annotation, Text
from rows import metric, row, sweep

from vlmattn.eval import plots


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
    moved = row("threshold(+0.37)", 0.5, 144, 9.0, "control", spec="none")
    assert plots.families([named, moved]) == [("fastv", "0.25"), ("threshold", "+0.37")]
    assert plots.families([row("x", 0.5, 72, 4.0, spec="gone(keep=1)")]) == [("x", "")]


def test_budgets_are_joined_controls_are_hollow_and_the_baseline_is_a_band() -> None:
    figure = plots.figure([plots.graph(sweep(), "mean_accuracy", "macs")])
    (axes,) = figure.axes
    series = {line.get_marker(): line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_marker() != "*"}  # type: ignore[arg-type]
    fastv = series["o"]
    looks = [
        (to_hex(line.get_color()), line.get_markerfacecolor(), line.get_linestyle())
        for line in axes.lines
        if line.get_markerfacecolor() == "white"
    ]
    assert len(looks) == 3 and {look[0] for look in looks} == {plots.GREY} and {look[2] for look in looks} == {"None"}
    joined = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert len(joined) == 2 and fastv is not None  # fastv and uniform at two budgets each
    assert any(line.get_linestyle() == "--" for line in axes.lines)
    assert len(axes.patches) == 1  # the band
    bars = [entry for entry in axes.collections if isinstance(entry, LineCollection)]
    assert len(bars) == len(sweep()) - 1
    assert sum(line.get_marker() == "x" for line in axes.lines) == 1  # the row that must not be compared
    colours = {to_hex(line.get_color()) for line in joined}
    assert len(colours) == 2 and colours <= set(plots.COLOURS)


def test_the_same_family_looks_the_same_in_all_graphs() -> None:
    rows = sweep()
    graphs = [plots.graph(rows, "mean_f1", "macs"), plots.graph(rows[3:], "mean_f1", "macs")]
    figure = plots.figure(graphs)
    colours = [
        {to_hex(line.get_color()) for line in axes.lines if line.get_marker() == "s" and line.get_linestyle() == "-"}
        for axes in figure.axes
    ]
    assert colours == [{plots.COLOURS[1]}] * 2


def test_labels_do_not_lie_on_each_other() -> None:
    crowd = [row("none", 0.9, 144, 9.0, "baseline")]
    for keep in range(16, 144, 16):
        crowd.append(row(f"fastv(keep={keep})", 0.8 + keep / 2000, keep, 5 + keep / 40))
        crowd.append(row(f"uniform(keep={keep})", 0.8 + keep / 2100, keep, 5 + keep / 38))
    figure = plots.figure([plots.graph(crowd, "mean_accuracy", x) for x in ("measured", "macs")])
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text, renderer) for text in axes.texts if isinstance(text, Annotation)]
        assert len(boxes) == 16
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


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
