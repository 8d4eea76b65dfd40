"""The tables of a page: right answers, cost, differences, controls, every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlmattn.eval import compare, page, stats, summary, tabular
from vlmattn.eval.compare import Comparison
from vlmattn.eval.sentences import (
    counted,
    direction,
    power_note,
    range_text,
    signed,
    signed_difference,
    span_text,
)
from vlmattn.eval.stats import Paired
from vlmattn.eval.tally import Metric

_ROLES: Mapping[str, Any] = {"method": "", "below floor": "none", "refused": "none"}


def accuracy_table(
    rows: Sequence[summary.Row], keys: Sequence[str] = (), *, title: str = "Accuracy", notes: Sequence[str] = ()
) -> page.Table:
    """Metrics with their intervals and their differences to the baseline.

    Args:
        rows: the baseline first.
        keys: of the metrics shown; the headlines if empty.
        title: heading of the section.
        notes: what stands below it before the notes on how to read it.
    """
    shown = [metric for metric in summary.metrics(rows, headline=not keys) if not keys or metric.key in keys]
    unparsed = any(row.score.get("unparsed") for row in rows)
    columns = [page.Column("method", number=False, code=True)]
    columns += [
        page.Column(metric.title, _small_print("%" if metric.percent else "", _image_counts(rows, metric)))
        for metric in shown
    ]
    columns += [page.Column("unparsed", "answers")] if unparsed else []
    everywhere = set.intersection(*({row.note} for row in rows)) - {""} if len(rows) > 1 else set()
    body = []
    for row in rows:
        cells = [metric_cell(row, metric) for metric in shown]
        if unparsed:
            count = row.score.get("unparsed")
            cells.append(_none() if count is None else page.Cell(str(count), value=count))
        below = [row.note] if row.note and row.note not in everywhere else []
        below += [f"{counted(len(row.failed), 'question')} failed and left out"] if row.failed else []
        body.append(_line(row, cells, below))
    told = list(notes)
    if any(ends is not None for row in rows for ends in row.intervals.values()):
        told.append("In small print 95 % intervals, from resampling images.")
    if any(row.versus for row in rows):
        told.append(
            f"With a sign: the difference to {rows[0].label} and the p of a paired test over images, after Holm's "
            "correction over the headlines, or over the other tasks. * and coloured: p below 0.05."
        )
    told += filter(None, (power_note(rows, metric) for metric in shown[:1]))
    return page.Table(title, columns, body, notes=[*told, *sorted(everywhere)])


def control_tables(rows: Sequence[summary.Row]) -> list[page.Section]:
    """Headline differences of methods to random tokens at the same layer; nothing where no row was tested so."""
    tested = [row for row in rows if row.versus_control]
    shown = summary.metrics(tested, headline=True)
    if not shown:
        return []
    columns = [page.Column("method", number=False, code=True)]
    columns += [
        page.Column(metric.title, _small_print("points" if metric.percent else "", _image_counts(tested, metric)))
        for metric in shown
    ]
    body = []
    for row in tested:
        cells = [_control_cell(row, metric) for metric in shown]
        body.append(_line(row, cells, [f"against {row.control}"]))
    notes = [
        "Method minus random tokens: as many on average, from the same first layer on, seed 0. A method that is no "
        "better than these owes what it keeps to how many tokens stay, not to which. In small print 95 % intervals and "
        "the p of a paired test over images, after Holm's correction over the headlines, or the other tasks. * and "
        "coloured: p below 0.05."
    ]
    return [page.Table("Against random tokens at the same layer", columns, body, notes=notes)]


def cost_table(rows: Sequence[summary.Row], *, title: str = "Cost") -> page.Table:
    """What the rows cost: tokens, arithmetic, memory, time."""
    memory = any(row.cost.get("peak_memory_bytes") for row in rows)
    columns = [
        page.Column("method", number=False, code=True),
        page.Column("visual tokens", "mean over layers"),
        page.Column("prefill MACs", "% of unpruned"),
        page.Column("KV cache", "after prefill"),
        page.Column("prefill", "ms a question"),
        page.Column("per token", "ms a question"),
        page.Column("in all", "ms a question"),
        *([page.Column("peak memory", "GPU")] if memory else []),
        *(page.Column(title) for title in tabular.extra_columns(rows)),
    ]
    notes = [
        "Tokens, MACs and bytes are exact, means over questions. Times are medians over the full batches of one run on "
        "this machine, vision tower included, divided by the batch size, whatever else the machine was doing: trust "
        "large differences only."
    ]
    notes += tabular.timing_notes(rows)
    extra = tabular.extra_columns(rows).values()
    body = [
        dataclasses.replace(
            _line(row, [*cost_cells(row.cost, memory), *(_stacked(text(row.cost)) for text in extra)]), invalid=""
        )
        for row in rows
    ]
    return page.Table(title, columns, body, notes=notes)


def cost_cells(cost: Mapping[str, Any], memory: bool = False) -> list[page.Cell]:
    """Visual tokens, MACs, KV cache, prefill, per token, per question and, if asked for, memory; dashes for none."""
    if not cost.get("questions"):
        floor = [f"floor {cost['floor']:.4g}"] if "floor" in cost else []
        return [page.Cell(page.DASH, floor), *(_none() for _ in range(6 if memory else 5))]
    tokens, step, peak = cost["average_visual_tokens"], cost["ms_per_token"], cost.get("peak_memory_bytes")
    kept = f"{100 * cost['kv_bytes'] / cost['kv_bytes_full']:.0f} %"
    cells = [
        page.Cell(f"{tokens:.4g}", [f"of {cost['visual_tokens']:.4g}"], tokens),
        _cell(100 * cost["prefill_macs_ratio"], ".0f"),
        page.Cell(tabular.bytes_text(cost["kv_bytes"]), [kept], cost["kv_bytes"]),
        _milliseconds(cost["prefill_ms_per_question"]),
        _none() if step is None else _milliseconds(step / cost["batch_size"]),
        _milliseconds(cost["ms_per_question"]),
    ]
    if memory:
        cells.append(page.Cell(tabular.bytes_text(peak), value=peak) if peak else _none())
    return cells


def differences_table(comparison: Comparison, *, named: bool, notes: Sequence[str] = ()) -> page.Table:
    """The tests of a comparison: headlines, and the first metric of every task.

    Args:
        comparison: of two runs.
        named: whether the heading names the second run, as it must where there are several.
        notes: what stands below it.
    """
    first, second = comparison.first.label, comparison.second.label
    columns = [
        page.Column("metric", number=False),
        page.Column("first", "%"),
        page.Column("second", "%"),
        page.Column("difference", "95 % interval"),
        page.Column("p", "paired test"),
        page.Column("p Holm", "all tests"),
        page.Column("images"),
        page.Column("detectable", "80 % power, and images it takes"),
    ]
    body = []
    for pair in comparison.paired:
        if not pair.headline and pair.p_holm is None:
            continue
        ends = [] if pair.interval is None else [" to ".join(signed(end, pair.percent) for end in pair.interval)]
        cells = [
            page.Cell(pair.title, [] if pair.percent else ["not a share: in its own unit"], pair.title),
            *(page.Cell(tabular.number_text(value, pair.percent), value=value) for value in (pair.first, pair.second)),
            page.Cell(tabular.difference_text(pair, pair.percent), ends, pair.difference, _coloured(pair)),
            _none() if pair.p is None else page.Cell(compare.p_text(pair.p), [pair.test], pair.p),
            _none() if pair.p_holm is None else page.Cell(compare.p_text(pair.p_holm), value=pair.p_holm),
            page.Cell(str(pair.images), value=pair.images),
            _power(pair),
        ]
        body.append(page.Row(cells))
    title = f"Differences: {second} against {first}" if named else "Differences"
    text = f"First: {first}. Second: {second}. A difference is second minus first."
    return page.Table(title, columns, body, text, notes)


def every_number(rows: Sequence[summary.Row]) -> page.Table:
    """All metrics, a line each, folded away."""
    filled = [row for row in rows if row.score]
    columns = [page.Column("metric", number=False), *(page.Column(row.label) for row in filled)]
    body = []
    for metric in summary.metrics(rows):
        name = page.Cell(summary.title(metric), [metric.key], metric.key)
        body.append(page.Row([name, *(metric_cell(row, metric, test=False) for row in filled)]))
    return page.Table("Every number", columns, body, folded=True)


def metric_cell(row: summary.Row, metric: Metric, *, test: bool = True) -> page.Cell:
    """A value, its interval and, if asked for, its difference to the baseline with p; a dash where there is none."""
    value, pair, ends = row.value(metric.key), row.versus.get(metric.key), row.intervals.get(metric.key)
    if value is None:
        return _none()
    lines = [] if ends is None else [range_text(ends, metric.percent)]
    text, struck = tabular.number_text(value, metric.percent), bool({*metric.groups} & {*row.collapsed})
    if pair is None or not test:
        return page.Cell(text, lines, value, struck=struck)
    p, name = (pair.p, "p uncorrected") if pair.p_holm is None else (pair.p_holm, "p")
    told = "" if p is None else f", {name} {compare.p_text(p)}"
    lines.append(tabular.difference_text(pair, pair.percent) + told)
    return page.Cell(text, lines, value, _coloured(pair), struck)


def _control_cell(row: summary.Row, metric: Metric) -> page.Cell:
    """The difference to random tokens with its interval and p; a dash where there is none."""
    pair = row.versus_control.get(metric.key)
    if pair is None or row.value(metric.key) is None:
        return _none()
    lines = [] if pair.interval is None else [" to ".join(signed(end, pair.percent) for end in pair.interval)]
    p, name = (pair.p, "p uncorrected") if pair.p_holm is None else (pair.p_holm, "p")
    lines += [] if p is None else [f"{name} {compare.p_text(p)}"]
    text, struck = tabular.difference_text(pair, pair.percent), bool({*metric.groups} & {*row.collapsed})
    return page.Cell(text, lines, pair.difference, _coloured(pair), struck)


def _line(row: summary.Row, cells: Sequence[page.Cell], notes: Sequence[str] = ()) -> page.Row:
    role = _ROLES.get(row.role, row.role)
    return page.Row([page.Cell(row.label, value=row.label), *cells], role, row.invalid, notes)


def _stacked(text: str) -> page.Cell:
    """A cell of the terminal's tables: what is in brackets stands below."""
    value, _, rest = text.partition(" (")
    if value == "-":
        return _none()
    return page.Cell(value, [rest.rstrip(")")] if rest else [], float(value.split()[0]))


def _none() -> page.Cell:
    return page.Cell(page.DASH)


def _milliseconds(value: float) -> page.Cell:
    return page.Cell(tabular.milliseconds(value), value=value)


def _cell(value: float, form: str) -> page.Cell:
    return page.Cell(format(value, form), value=value)


def _power(pair: Paired) -> page.Cell:
    """What could be seen and, where it is not enough to see what was found, how many images would be."""
    if pair.detectable is None:
        return _none()
    needed = None
    if pair.difference and not pair.significant():
        needed = stats.images_needed(pair.standard_error, pair.images, pair.difference)
    lines = [f"{signed_difference(pair)} takes {needed:,}"] if needed is not None and needed > pair.images else []
    return page.Cell(tabular.number_text(pair.detectable, pair.percent), lines, pair.detectable)


def _image_counts(rows: Sequence[summary.Row], metric: Metric) -> str:
    """ "25 images" that a metric is about, "24 to 25 images" where rows differ; "" where no row says."""
    counts = [row.images[metric.key] for row in rows if metric.key in row.images]
    return f"{span_text(counts)} image{'' if max(counts) == 1 else 's'}" if counts else ""


def _small_print(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _coloured(pair: Paired) -> Any:
    return direction(pair) if pair.significant() else ""
