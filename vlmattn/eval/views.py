"""What the page of a sweep and the page of a comparison say; how it looks is up to `page`.

Sentences are made from the numbers and claim no more than they do: "worse" and "better" stand only where a paired test
says so, everything else is "no difference found", with what would have been missed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import DataError
from vlmattn.eval import bench as benches
from vlmattn.eval import compare, controls, flipped, page, stats, summary, tabular
from vlmattn.eval.compare import Comparison
from vlmattn.eval.flipped import OpenImage, Side
from vlmattn.eval.items import Benchmark
from vlmattn.eval.runs import Run
from vlmattn.eval.stats import Paired
from vlmattn.eval.tally import Metric

PAGE = "index.html"
EXAMPLES = 12
_MOST_SENTENCES = 12
_ROLES: Mapping[str, Any] = {"method": "", "below floor": "none"}
_EMBEDDED = (
    "These are results of {name}, a model of two million parameters that ships with the package and was trained on "
    "rendered scenes. They claim nothing about any real vision-language model."
)


_TESTS = (
    "Below a difference its 95 % interval, from resampling images for both runs alike. * and coloured: p Holm, which "
    "allows for the number of tests of the comparison, is below 0.05.",
    "p: McNemar's exact test (mcnemar), the same with images as units where an image has several changed answers "
    "(mcnemar, by image), or a paired bootstrap over images (bootstrap).",
    "Detectable: the smallest true difference that a comparison of this size finds in 80 of 100 cases; in small print "
    "how many images it takes to find the difference that stands here.",
)


def write_sweep(
    out: str | Path,
    bench: Benchmark,
    rows: Sequence[summary.Row],
    runs: Sequence[Run],
    about: Mapping[str, Any],
    *,
    examples: int = EXAMPLES,
) -> Path:
    """Write OUT/index.html, the page of a sweep.

    Args:
        out: folder of the sweep.
        bench: what was asked.
        rows: of the table, the baseline first; levels below a floor are among them.
        runs: the runs behind the rows, the baseline first.
        about: what else is to be told, JSON-able (model, settings, versions).
        examples: how many flips are shown with their pictures.

    Returns:
        The path of the page.

    Raises:
        DataError: there is no run.
    """
    return page.write(sweep_page(out, bench, rows, runs, about, examples=examples), Path(out) / PAGE)


def write_comparison(path: str | Path, comparisons: Sequence[Comparison], *, examples: int = EXAMPLES) -> Path:
    """Write the page of a comparison of runs, each with the same first one.

    Args:
        path: the file.
        comparisons: one or more, as `compare.compare` gives them.
        examples: how many flips are shown with their pictures.

    Returns:
        The path of the page.

    Raises:
        DataError: there is no comparison.
    """
    return page.write(comparison_page(comparisons, examples=examples), path)


def sweep_page(
    out: str | Path,
    bench: Benchmark,
    rows: Sequence[summary.Row],
    runs: Sequence[Run],
    about: Mapping[str, Any],
    *,
    examples: int = EXAMPLES,
) -> page.Page:
    """What `write_sweep` writes."""
    if not rows or not runs:
        raise DataError("the page of a sweep needs at least one run")
    base = runs[0]
    sides = []
    for row in rows:
        run = next((run for run in runs if (run.folder, run.label) == (row.folder, row.label)), None)
        if run is not None and run is not base and row.role == "method":
            sides.append(Side(row.label, base, run, compare.find_flips(base, run)))
    tests = ("All tests between these runs:", f"vlmattn compare {shlex.quote(str(out))} --html compare.html")
    sections: list[page.Section] = [
        *_warning(runs),
        accuracy_table(rows),
        *control_tables(rows),
        *_plot(rows),
        cost_table(rows),
        *flipped.sections(sides, bench.open_image, examples),
        every_number(rows),
        page.Facts("How it was run", facts(runs, about)),
        page.Commands("Do it again", [*_commands(runs), *([tests] if len(runs) > 1 else [])]),
    ]
    methods = sum(row.role == "method" for row in rows)
    title = f"{bench.name} on {_model(base)}" + (
        f": {_count(methods, 'method')} against {rows[0].label}" if methods else ""
    )
    return page.Page(title, sweep_lead(bench, rows, base), sections)


def comparison_page(comparisons: Sequence[Comparison], *, examples: int = EXAMPLES) -> page.Page:
    """What `write_comparison` writes."""
    if not comparisons:
        raise DataError("the page of a comparison needs two runs or more")
    first = comparisons[0].first
    runs = [first, *(entry.second for entry in comparisons)]
    rows = [summary.row(first, role="baseline"), *map(_second_row, comparisons)]
    sides = [Side(entry.second.label, entry.first, entry.second, entry.flips) for entry in comparisons]
    folders = " ".join(shlex.quote(run.folder) for run in runs)
    several = len(comparisons) > 1
    sections: list[page.Section] = [
        *_warning(runs),
        *([accuracy_table(rows)] if several else []),
        *(differences_table(entry, named=several) for entry in comparisons[:-1]),
        differences_table(comparisons[-1], named=several, notes=_TESTS),
        *_plot(rows),
        cost_table(rows),
        *flipped.sections(sides, _opener(first), examples),
        every_number(rows),
        page.Facts("How it was run", facts(runs, {})),
        page.Commands(
            "Do it again", [*_commands(runs), ("This comparison:", f"vlmattn compare {folders} --html compare.html")]
        ),
    ]
    seconds = f"{len(sides)} runs" if several else sides[0].label
    return page.Page(
        f"{first.scorer.name} on {_model(first)}: {seconds} against {first.label}",
        comparison_lead(comparisons, rows[1:]),
        sections,
    )


def sweep_lead(bench: Benchmark, rows: Sequence[summary.Row], base: Run) -> list[str]:
    """What the numbers of a sweep say: what was asked, the baseline's values, and a sentence per method."""
    counts = Counter(row.role for row in rows)
    under = [_count(counts[role], role) for role in ("method", "control") if counts[role]]
    again = f", and again under {' and '.join(under)}. Nothing was retrained." if under else "."
    sentences = [f"{_model(base)} answered {_asked(base)} ({bench.source}) under {rows[0].label}{again}"]
    if values := [
        f"{metric.title} {_with_interval(rows[0], metric)}"
        for metric in summary.metrics(rows, headline=True)
        if rows[0].value(metric.key) is not None
    ]:
        sentences.append(f"{rows[0].label}: {', '.join(values[:3])}.")
    methods = [row for row in rows if row.role == "method"]
    sentences += [sentence(row, rows[0].label) for row in methods[:_MOST_SENTENCES]]
    if len(methods) > _MOST_SENTENCES:
        sentences.append(f"{_count(len(methods) - _MOST_SENTENCES, 'more method')}: see the table.")
    return sentences


def comparison_lead(comparisons: Sequence[Comparison], rows: Sequence[summary.Row]) -> list[str]:
    """What the numbers of a comparison say: what was asked, and a sentence per run.

    Args:
        comparisons: with the same first run.
        rows: the second runs, in the same order.
    """
    first = comparisons[0].first
    seconds = ", ".join(entry.second.label for entry in comparisons)
    sentences = [f"{_model(first)} answered {_asked(first)} under {first.label}, and again under {seconds}."]
    for entry, row in zip(comparisons, rows, strict=True):
        # The notes of a comparison say why a run must not be compared.
        sentences += [sentence(dataclasses.replace(row, invalid=""), first.label), *entry.notes]
    return sentences


def sentence(row: summary.Row, base: str) -> str:
    """Cost of a method, and what the paired tests say about it, against a baseline of that label.

    "fastv(keep=0.11): 58.7 of 144 visual tokens a layer, 47 % of the prefill MACs; worse than none in digits accuracy
    (-20.0); no difference found in the other 8 of 9 tests (differences of accuracy below 9.1 points are easily missed);
    better than random tokens at the same layer in digits accuracy (+12.0)."
    """
    parts = []
    if row.cost.get("questions"):
        kept, whole = row.cost["average_visual_tokens"], row.cost["visual_tokens"]
        share = f"{100 * row.cost['prefill_macs_ratio']:.0f} % of the prefill MACs"
        parts.append(
            f"{kept:.3g} of {whole:.3g} visual tokens a layer, {share}" if kept < whole else "no token dropped"
        )
    tested = _tested(row, row.versus)
    found = sorted((pair for pair in tested if pair.significant()), key=lambda pair: -abs(pair.difference))
    for words, tone in ((f"worse than {base}", "bad"), (f"better than {base}", "good"), ("different", "")):
        if chosen := _named(found, tone):
            parts.append(f"{words} in {chosen}")
    rest = len(tested) - len(found)
    if not tested:
        parts.append("too few images to test a difference" if row.versus else "differences were not tested")
    elif rest:
        which = f"the other {rest} of {len(tested)} tests" if found else _count(rest, "test")
        parts.append(f"no difference found in {which}{_missed(tested)}")
    parts += _against_random(row, told=_missed(tested))
    if row.invalid:
        parts.append(f"not to be compared, {row.invalid}")
    return f"{row.label}: {'; '.join(parts)}."


def _tested(row: summary.Row, pairs: Mapping[str, Paired]) -> list[Paired]:
    """The differences that sentences speak of: tested ones, not about captions that collapsed."""
    return [pair for pair in pairs.values() if pair.p_holm is not None and pair.group not in row.collapsed]


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
        "Method minus random tokens: as many of them, kept before the same layer, seed 0. A method that is no better "
        "than these owes what it keeps to how many tokens stay, not to which. In small print 95 % intervals and the p "
        "of a paired test over images, after Holm's correction over the headlines, or the other tasks. * and coloured: "
        "p below 0.05."
    ]
    return [page.Table("Against random tokens at the same layer", columns, body, notes=notes)]


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
        below += [f"{_count(len(row.failed), 'question')} failed and left out"] if row.failed else []
        body.append(_line(row, cells, below))
    told = list(notes)
    if any(ends is not None for row in rows for ends in row.intervals.values()):
        told.append("In small print 95 % intervals, from resampling images.")
    if any(row.versus for row in rows):
        told.append(
            f"With a sign: the difference to {rows[0].label} and the p of a paired test over images, after Holm's "
            "correction over the headlines, or over the other tasks. * and coloured: p below 0.05."
        )
    told += [_power_note(rows, metric) for metric in shown[:1] if _detectable(rows, metric)]
    return page.Table(title, columns, body, notes=[*told, *sorted(everywhere)])


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
    ]
    notes = [
        "Tokens, MACs and bytes are exact, means over questions. Times are medians over the full batches of one run on "
        "this machine, vision tower included, divided by the batch size, whatever else the machine was doing: trust "
        "large differences only."
    ]
    body = [dataclasses.replace(_line(row, cost_cells(row.cost, memory)), invalid="") for row in rows]
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
        _cell(cost["prefill_ms_per_question"], ".3g"),
        _none() if step is None else _cell(step / cost["batch_size"], ".3g"),
        _cell(cost["ms_per_question"], ".3g"),
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
        ends = [] if pair.interval is None else [" to ".join(_signed(end, pair.percent) for end in pair.interval)]
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
    lines = [] if ends is None else [_range(ends, metric.percent)]
    text, struck = tabular.number_text(value, metric.percent), bool({*metric.groups} & {*row.collapsed})
    if pair is None or not test:
        return page.Cell(text, lines, value, struck=struck)
    p, name = (pair.p, "p uncorrected") if pair.p_holm is None else (pair.p_holm, "p")
    told = "" if p is None else f", {name} {compare.p_text(p)}"
    lines.append(tabular.difference_text(pair, pair.percent) + told)
    return page.Cell(text, lines, value, _coloured(pair), struck)


def facts(runs: Sequence[Run], about: Mapping[str, Any]) -> dict[str, str]:
    """Model, data, decoding and versions of runs; where they differ, all values. Then what else there is to tell."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in _facts(run).items():
            found.setdefault(name, {})[value] = None
    known = ("model", "settings", "versions", "platform", "command")
    more = {name.replace("_", " "): _words(value) for name, value in about.items() if name not in known}
    return {name: " | ".join(values) for name, values in found.items()} | more


def embedded(runs: Iterable[Run]) -> list[str]:
    """Names of the models of these runs that ship with the package."""
    from vlmattn.scenes import names

    return [name for name in dict.fromkeys(map(_model, runs)) if name in names()]


def _facts(run: Run) -> dict[str, str]:
    identity, info = run.identity, run.info
    model, data, decode = (identity.get(name) or {} for name in ("model", "data", "decode"))
    kind = ", ".join(
        str(part) for part in (info.get("model_class"), model.get("dtype"), identity.get("device")) if part
    )
    limit = data.get("limit")
    how = "greedy" if not decode.get("do_sample") and decode.get("num_beams") == 1 else _words(decode)
    if more := decode.get("generation_config"):
        how += f" with the checkpoint's {_words(more)}"
    values = {
        "model": f"{model.get('name', 'unknown')} ({kind})" if kind else str(model.get("name", "unknown")),
        "checkpoint": model.get("fingerprint"),
        "sink dimensions": identity.get("sink_dims"),
        "benchmark": f"{run.scorer.name}, answers read by profile {run.scorer.profile}",
        "data": (info.get("data") or {}).get("source"),
        "data SHA-256": data.get("sha256"),
        "questions": _asked(run) + ("" if limit is None else f", the first {limit} of each task"),
        "prompt": identity.get("prompt"),
        "decoding": f"{how}, at most {decode.get('max_new_tokens')} tokens, batches of {decode.get('batch_size')}",
        "image size": info.get("image_size"),
        "seeds": info.get("seeds"),
        "machine": info.get("platform"),
        "versions": info.get("versions") or identity.get("versions"),
    }
    return {name: _words(value) for name, value in values.items() if value not in (None, "", {}, [])}


def _words(value: Any) -> str:
    """Nested data as a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return str(value)


def _second_row(comparison: Comparison) -> summary.Row:
    """The second run as a row; its tests are there already."""
    collapsed = controls.collapse(comparison.first.tally, comparison.second.tally)
    versus = {pair.key: pair for pair in comparison.paired}
    return dataclasses.replace(
        summary.row(comparison.second), versus=versus, invalid="; ".join(collapsed.values()), collapsed=tuple(collapsed)
    )


def _line(row: summary.Row, cells: Sequence[page.Cell], notes: Sequence[str] = ()) -> page.Row:
    role = _ROLES.get(row.role, row.role)
    return page.Row([page.Cell(row.label, value=row.label), *cells], role, row.invalid, notes)


def _none() -> page.Cell:
    return page.Cell(page.DASH)


def _cell(value: float, form: str) -> page.Cell:
    return page.Cell(format(value, form), value=value)


def _difference(pair: Paired) -> str:
    return _signed(pair.difference, pair.percent)


def _signed(value: float, percent: bool) -> str:
    text = tabular.number_text(abs(value), percent)
    return text if float(text) == 0 else f"{page.MINUS if value < 0 else '+'}{text}"


def _range(ends: tuple[float, float], percent: bool) -> str:
    return " to ".join(tabular.number_text(end, percent) for end in ends)


def _with_interval(row: summary.Row, metric: Metric) -> str:
    value, ends = row.value(metric.key) or 0.0, row.intervals.get(metric.key)
    text = tabular.number_text(value, metric.percent) + (" %" if metric.percent else "")
    return text if ends is None else f"{text} ({_range(ends, metric.percent)})"


def _tone(pair: Paired) -> Any:
    """Which way the difference points: "good", "bad", or "" where no direction is better."""
    if pair.better == "neither":
        return ""
    return "good" if (pair.difference > 0) == (pair.better == "higher") else "bad"


def _power(pair: Paired) -> page.Cell:
    """What could be seen and, where it is not enough to see what was found, how many images would be."""
    if pair.detectable is None:
        return _none()
    needed = None
    if pair.difference and not pair.significant():
        needed = stats.images_needed(pair.standard_error, pair.images, pair.difference)
    lines = [f"{_difference(pair)} takes {needed:,}"] if needed is not None and needed > pair.images else []
    return page.Cell(tabular.number_text(pair.detectable, pair.percent), lines, pair.detectable)


def _detectable(rows: Sequence[summary.Row], metric: Metric) -> list[Paired]:
    """The tests of that metric against the baseline, of methods only, whose power is known."""
    pairs = (row.versus.get(metric.key) for row in rows if row.role == "method")
    return [pair for pair in pairs if pair is not None and pair.detectable]


def _power_note(rows: Sequence[summary.Row], metric: Metric) -> str:
    """Which differences could have been seen: from the method measured best to the one measured worst."""
    pairs = _detectable(rows, metric)
    least, most = (_points(choose(pair.detectable or 0.0 for pair in pairs), metric.percent) for choose in (min, max))
    images = _span([pair.images for pair in pairs])
    both = f"{least.removesuffix(' points')} to {most} or more, depending on the method,"
    size = f"{most} or more" if least == most else both
    return (
        f"Power: with {images} images true differences of {metric.title} of {size} between a method and "
        f"{rows[0].label} are found in 80 of 100 comparisons. Smaller ones are easily missed."
    )


def _missed(tested: Sequence[Paired]) -> str:
    """What tests that found nothing could not see, for the first headline metric among them; "" if that is unknown."""
    unseen = [pair for pair in tested if pair.headline and not pair.significant()]
    if not unseen or not unseen[0].detectable:
        return ""
    pair = unseen[0]
    size = _points(pair.detectable or 0.0, pair.percent)
    return f" (differences of {pair.title} below {size} are easily missed)"


def _against_random(row: summary.Row, told: str) -> list[str]:
    """What the tests against random tokens at the same layer say; nothing where there are none.

    Args:
        row: of a method.
        told: what the tests against the baseline could not see, which is not said twice.
    """
    tested = _tested(row, row.versus_control)
    if not tested:
        return ["too few images to test it against random tokens"] if row.versus_control else []
    found = sorted((pair for pair in tested if pair.significant()), key=lambda pair: -abs(pair.difference))
    worse, better = _named(found, "bad"), _named(found, "good")
    parts = [f"worse than random tokens at the same layer in {worse}"] if worse else []
    if better:
        return [*parts, f"better than random tokens at the same layer in {better}"]
    tests = _count(len(tested), "test")
    missed = _missed(tested)
    text = f"not found better than random tokens at the same layer in any of {tests}"
    return [*parts, text if missed == told else text + missed]


def _named(pairs: Sequence[Paired], tone: str) -> str:
    """ "digits accuracy (+12.0) and F1 (+3.0)": those that point that way."""
    chosen = [f"{pair.title} ({_difference(pair)})" for pair in pairs if _tone(pair) == tone]
    return _list(chosen) if chosen else ""


def _control_cell(row: summary.Row, metric: Metric) -> page.Cell:
    """The difference to random tokens with its interval and p; a dash where there is none."""
    pair = row.versus_control.get(metric.key)
    if pair is None or row.value(metric.key) is None:
        return _none()
    lines = [] if pair.interval is None else [" to ".join(_signed(end, pair.percent) for end in pair.interval)]
    p, name = (pair.p, "p uncorrected") if pair.p_holm is None else (pair.p_holm, "p")
    lines += [] if p is None else [f"{name} {compare.p_text(p)}"]
    text, struck = tabular.difference_text(pair, pair.percent), bool({*metric.groups} & {*row.collapsed})
    return page.Cell(text, lines, pair.difference, _coloured(pair), struck)


def _image_counts(rows: Sequence[summary.Row], metric: Metric) -> str:
    """ "25 images" that a metric is about, "24 to 25 images" where rows differ; "" where no row says."""
    counts = [row.images[metric.key] for row in rows if metric.key in row.images]
    return f"{_span(counts)} image{'' if max(counts) == 1 else 's'}" if counts else ""


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _small_print(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _points(value: float, percent: bool) -> str:
    """ "11 points" of a share, else the bare number: a difference to two digits."""
    return f"{100 * value:.2g} points" if percent else f"{value:.3g}"


def _coloured(pair: Paired) -> Any:
    return _tone(pair) if pair.significant() else ""


def _plot(rows: Sequence[summary.Row]) -> list[page.Section]:
    from vlmattn.eval import plots

    drawn = [row for row in rows if row.cost.get("questions") and row.score]
    if len(drawn) < 2 or not summary.metrics(drawn, headline=True):
        return []
    notes = ["Left is cheaper, up is higher. Bars and the grey band around the baseline are 95 % intervals."]
    return [page.Plot("Against cost", plots.tradeoff(drawn), notes)]


def _warning(runs: Sequence[Run]) -> list[page.Section]:
    found = embedded(runs)
    return [page.Prose("", [_EMBEDDED.format(name=" and ".join(found))], warning=True)] if found else []


def _opener(run: Run) -> OpenImage:
    """Opens the images of a run where they can be found again; every call says why where they cannot."""
    pictures = run.info.get("pictures")
    try:
        return benches.open_pictures(pictures or {})
    except DataError as error:
        reason = str(error) if pictures else "the run does not say where its images are"

    def refuse(name: str) -> Any:
        raise DataError(reason)

    return refuse


def _commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    commands = dict.fromkeys(command for run in runs if (command := run.info.get("command")))
    return [("What was run; it goes on where it was stopped:", command) for command in commands]


def _model(run: Run) -> str:
    return str((run.identity.get("model") or {}).get("name", "unknown model"))


def _asked(run: Run) -> str:
    images = len({item.image for item in run.items})
    return f"{_count(len(run.items), 'question')} about {_count(images, 'image')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _list(parts: Sequence[str], most: int = 4) -> str:
    shown = [*parts[:most], *([f"{len(parts) - most} more"] if len(parts) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
