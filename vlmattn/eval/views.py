"""The page of a sweep and the page of a comparison: which sections they have; how they look is up to `page`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.errors import DataError
from vlmattn.eval import bench as benches
from vlmattn.eval import compare, controls, flipped, page, summary
from vlmattn.eval.compare import Comparison
from vlmattn.eval.flipped import OpenImage, Side
from vlmattn.eval.items import Benchmark
from vlmattn.eval.page_tables import accuracy_table, control_tables, cost_table, differences_table, every_number
from vlmattn.eval.runs import Run
from vlmattn.eval.sentences import asked, comparison_lead, counted, model_name, sweep_lead

PAGE = "index.html"
EXAMPLES = 12
_EMBEDDED = (
    "These are results of {name}, a small model that ships with the package and was trained on rendered scenes. They "
    "claim nothing about any real vision-language model."
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
        *_kept(rows),
        *flipped.sections(sides, bench.open_image, examples),
        every_number(rows),
        page.Facts("How it was run", facts(runs, about)),
        page.Commands("Do it again", [*_commands(runs), *([tests] if len(runs) > 1 else [])]),
    ]
    methods = sum(row.role == "method" for row in rows)
    title = f"{bench.name} on {model_name(base)}" + (
        f": {counted(methods, 'method')} against {rows[0].label}" if methods else ""
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
        f"{first.scorer.name} on {model_name(first)}: {seconds} against {first.label}",
        comparison_lead(comparisons, rows[1:]),
        sections,
    )


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

    return [name for name in dict.fromkeys(map(model_name, runs)) if name in names()]


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
        "questions": asked(run) + ("" if limit is None else f", the first {limit} of each task"),
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


def _plot(rows: Sequence[summary.Row]) -> list[page.Section]:
    from vlmattn.eval import plots

    drawn = [row for row in rows if row.cost.get("questions") and row.score]
    if len(drawn) < 2 or not summary.metrics(drawn, headline=True):
        return []
    notes = ["Left is cheaper, up is higher. Bars and the grey band around the baseline are 95 % intervals."]
    return [page.Plot("Against cost", plots.tradeoff(drawn), notes)]


def _kept(rows: Sequence[summary.Row]) -> list[page.Section]:
    from vlmattn.eval import place_plots

    if not any("kept_bands" in row.cost for row in rows):
        return []
    notes = [
        "Of every method the share of its kept tokens in bands of the image's height, beside an even choice. A method "
        "that goes by attention may keep one edge of every image, whatever is in it."
    ]
    return [page.Plot("Where kept tokens are", place_plots.kept_bands(rows), notes)]


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
