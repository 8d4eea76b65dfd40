"""From records to a table: cost per run, score with intervals, one row a spec; needs no model and no torch."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import DataError
from vlmattn.eval import records as run_records
from vlmattn.eval.items import Benchmark, Item

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        label: the spec as the user typed it.
        spec: canonical spec text.
        folder: the run folder.
        score: metrics of the benchmark.
        intervals: metric -> (low, high) at 95 %, None where there are too few images; empty without scipy.
        cost: what `cost_of` found, plus `peak_memory_bytes` on a GPU.
        failed: id -> error of the records without an answer.
        note: what a reader must know, for instance that intervals are missing and why.
    """

    label: str
    spec: str
    folder: str
    score: dict[str, Any]
    intervals: dict[str, tuple[float, float] | None]
    cost: dict[str, Any]
    failed: dict[str, str]
    note: str = ""


def cost_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost of a run from its records.

    Returns:
        `questions`; means per question: `visual_tokens`, `visual_per_layer` (list), `average_visual_tokens` (over
        layers), `kv_bytes`, `kv_bytes_full`, `prefill_macs`, `prefill_macs_full`, `prefill_macs_ratio`; medians over
        batches: `prefill_ms` (to the first token, whole batch), `prefill_ms_per_question`, `ms_per_token` (a later
        step of a batch; None when no answer has two tokens). Empty but for `questions` when nothing was answered.
    """
    good = [record for record in records if record.get("status") == "ok"]
    if not good:
        return {"questions": 0}
    costs = [record["cost"] for record in good]
    layers = [statistics.fmean(column) for column in zip(*(cost["visual_per_layer"] for cost in costs), strict=True)]
    result: dict[str, Any] = {
        "questions": len(good),
        "visual_per_layer": layers,
        "average_visual_tokens": statistics.fmean(layers),
    }
    for name in ("prompt_tokens", "visual_tokens", "kv_bytes", "kv_bytes_full", "prefill_macs", "prefill_macs_full"):
        result[name] = statistics.fmean(cost[name] for cost in costs)
    result["prefill_macs_ratio"] = (
        result["prefill_macs"] / result["prefill_macs_full"] if result["prefill_macs_full"] else 1.0
    )
    batches = list({record["time"]["batch"]: record["time"] for record in good}.values())
    full = max(batch["questions"] for batch in batches)
    batches = [batch for batch in batches if batch["questions"] == full]  # a short last batch is not comparable
    steps = [batch["decode_ms"] / (batch["new_tokens"] - 1) for batch in batches if batch["new_tokens"] > 1]
    result["batch_size"] = full
    result["prefill_ms"] = statistics.median(batch["prefill_ms"] for batch in batches)
    result["prefill_ms_per_question"] = result["prefill_ms"] / full
    result["ms_per_token"] = statistics.median(steps) if steps else None
    return result


def row(
    label: str,
    spec: str,
    folder: str,
    bench: Benchmark,
    items: Sequence[Item],
    records: Sequence[Mapping[str, Any]],
    cost: Mapping[str, Any],
    seed: int = 0,
) -> Row:
    """Score the records of a run."""
    texts, failed = run_records.texts(records), run_records.failed(records)
    score = bench.score(items, texts, failed)
    try:
        intervals, note = bench.intervals(items, texts, failed, seed=seed), ""
    except DataError as error:
        intervals, note = {}, str(error)
    return Row(label, spec, folder, score, intervals, dict(cost), failed, note)


def write(out: Path, bench: Benchmark, rows: Sequence[Row], about: Mapping[str, Any]) -> Path:
    """Write OUT/summary.json atomically; returns its path."""
    path = out / "summary.json"
    value = {
        "bench": bench.name,
        "data": {"sha256": bench.sha256, "source": bench.source, "files": bench.files},
        "profile": bench.profile,
        "prompt": bench.prompt,
        **about,
        "runs": [asdict(entry) for entry in rows],
    }
    run_records.write_json(path, value)
    return path


def table(bench: Benchmark, rows: Sequence[Row]) -> Table:
    """The terminal table of a sweep; the column of unparsed answers is there when there are some."""
    names = metric_columns(bench, rows)
    unparsed = bench.name == "pope" and any(entry.score["unparsed"] for entry in rows)
    head = ["method", "visual tokens", *names, *(["unparsed"] if unparsed else []), "KV cache", "prefill", "per token"]
    body = []
    for entry in rows:
        cells = [value_text(metric(entry.score, key), entry.intervals.get(key)) for key in names.values()]
        cells += [str(entry.score["unparsed"])] if unparsed else []
        body.append([entry.label, tokens_text(entry.cost), *cells, *cost_texts(entry.cost)])
    return terminal_table(f"{bench.name}: {bench.source}", head, body, [bool(entry.failed) for entry in rows])


def terminal_table(
    title: str, head: Sequence[str], body: Sequence[Sequence[str]], red: Sequence[bool] = (), texts: int = 1
) -> Table:
    """A table that fits 80 columns: titles are wrapped, what is in brackets goes on a second line.

    Args:
        title: above the table.
        head: column titles.
        body: rows of cells.
        red: which rows stand out; none if empty.
        texts: how many first columns are text, folded where they are long; the others are numbers and never cut.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left", pad_edge=False)
    for number, name in enumerate(head):
        if number < texts:
            view.add_column(name, overflow="fold")
        else:
            view.add_column(textwrap.fill(name, 10), justify="right", no_wrap=True)
    for number, row in enumerate(body):
        cells = [Text(cell) if column < texts else stacked(cell) for column, cell in enumerate(row)]
        view.add_row(*cells, style="red" if red and red[number] else None)
    return view


def metric_columns(bench: Benchmark, rows: Sequence[Row]) -> dict[str, str]:
    """Column title -> metric key of a benchmark's table."""
    if bench.name == "pope":
        return {"accuracy %": "mean_accuracy", "F1 %": "mean_f1"}
    return {f"{task} %": f"{task}.accuracy" for task in (rows[0].score["tasks"] if rows else ())}


def metric(score: Mapping[str, Any], key: str) -> float:
    """A number of a score by its interval key: "mean_f1", "random.f1", "loc.accuracy"."""
    if key in score:
        return float(score[key])
    group, name = key.split(".")
    return float((score.get("categories") or score["tasks"])[group][name])


def value_text(value: float, interval: tuple[float, float] | None) -> str:
    """ "84.2 (81.0-87.1)", in percent."""
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"


def stacked(text: str) -> str:
    """A cell on two lines, what is in brackets below: eight columns then fit a terminal."""
    value, bracket, rest = text.partition(" (")
    return f"{value}\n[dim]{rest.rstrip(')')}[/]" if bracket else text


def tokens_text(cost: Mapping[str, Any]) -> str:
    """ "79.2 (of 144)": visual tokens, mean over layers."""
    if not cost.get("questions"):
        return "-"
    return f"{cost['average_visual_tokens']:.4g} (of {cost['visual_tokens']:.4g})"


def cost_texts(cost: Mapping[str, Any]) -> list[str]:
    """KV cache, prefill time and time per token as a table shows them (per question; a step of the whole batch)."""
    if not cost.get("questions"):
        return ["-", "-", "-"]
    share = 100 * cost["kv_bytes"] / cost["kv_bytes_full"]
    step = cost["ms_per_token"]
    return [
        f"{bytes_text(cost['kv_bytes'])} ({share:.0f} %)",
        f"{cost['prefill_ms_per_question']:.3g} ms",
        "-" if step is None else f"{step / cost['batch_size']:.3g} ms",
    ]


def bytes_text(count: float) -> str:
    """A size with a binary unit: "288 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
