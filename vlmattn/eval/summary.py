"""From runs to rows: score, intervals, tests and cost of every spec of a sweep; needs no model and no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmattn.errors import DataError
from vlmattn.eval import places
from vlmattn.eval import records as run_records
from vlmattn.eval.items import Benchmark
from vlmattn.eval.tally import Metric, Tally

if TYPE_CHECKING:
    from vlmattn.eval.budgets import Match
    from vlmattn.eval.runs import Run
    from vlmattn.eval.stats import Paired

Role = Literal["baseline", "method", "control", "below floor", "refused"]
_DESCRIBED = ("key", "title", "group", "headline", "better", "percent")
"""What a metric and its paired test have in common; summary.json says it once."""
SUMMARY, CSV, LATEX, PLOT = "summary.json", "table.csv", "table.tex", "accuracy.svg"
MARKDOWN, PLACES = "table.md", "kept_rows.svg"


@dataclass(frozen=True)
class Row:
    """One run of a sweep, or what cannot be run: a level that a method does not reach, or a method that is refused.

    Attributes:
        label: what tables call it.
        spec: canonical spec text; "" of what cannot be run.
        folder: the run folder; "" of what cannot be run.
        score: `vlmattn.eval.tally.Scorer.numbers` of the run; empty of what cannot be run.
        intervals: metric key -> (low, high) at 95 %, None where there are too few images; empty without scipy.
        cost: what `cost_of` found, plus `peak_memory_bytes` on a GPU and what `timing.measure` found, if it was asked.
        failed: id -> error of the records without an answer.
        note: what a reader must know: why intervals are missing, or what the floor is.
        role: what the row is to the sweep.
        invalid: why the row is not comparable, "" if it is.
        collapsed: the groups whose captions collapsed, which is why.
        versus: metric key -> the difference to the baseline with its test; empty for the baseline itself.
        metrics: what the score consists of, in the order of the tables.
        control: label of the row with random tokens, as many on average from the same layer on; "" if there is none.
        versus_control: metric key -> the difference to that row with its test.
        images: metric key -> how many images it is about.
        uniform: label of the row with evenly spread tokens, matched in the same way; "" if there is none.
        versus_uniform: metric key -> the difference to that row with its test.
    """

    label: str
    spec: str
    folder: str
    score: Mapping[str, Any]
    intervals: Mapping[str, tuple[float, float] | None]
    cost: Mapping[str, Any]
    failed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    role: Role = "method"
    invalid: str = ""
    collapsed: tuple[str, ...] = ()
    versus: Mapping[str, Paired] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    control: str = ""
    versus_control: Mapping[str, Paired] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    uniform: str = ""
    versus_uniform: Mapping[str, Paired] = field(default_factory=dict)

    def value(self, key: str) -> float | None:
        """The metric of that key in its own unit (a share is 0 to 1); None where it is absent or undefined."""
        values = self.score.get("values", {}) if self.cost.get("questions") else {}  # of no answers: all are 0
        return None if key not in values or key in self.score["undefined"] else float(values[key])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; what is the same for all rows, the metrics and what describes them, is left out."""
        found = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self) if entry.name != "metrics"}
        for tests in ("versus", "versus_control", "versus_uniform"):
            found[tests] = {
                key: {name: value for name, value in pair.items() if name not in _DESCRIBED}
                for key, pair in found[tests].items()
            }
        return found


def cost_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost of a run from its records.

    Returns:
        `questions`; means per question: `visual_tokens`, `visual_per_layer` (list), `average_visual_tokens` (over
        layers), `kv_bytes`, `kv_bytes_full`, `prefill_macs`, `prefill_macs_full`, `prefill_macs_ratio`. Over the full
        batches of `batch_size` questions: medians `prefill_ms` (to the first token, whole batch, vision tower
        included), `prefill_ms_per_question`, `vision_ms` (the part of `prefill_ms` that was charged for vision features
        taken from a store), `ms_per_token` (a later step of a batch; None when no answer has two tokens), and the mean
        `new_tokens` (steps of a batch until its last answer ended).
        `kept_row` and `kept_bands` as `places.kept_rows` finds them.
        `ms_per_question` is the measured cost that plots show: `prefill_ms_per_question + ms_per_token *
        (new_tokens - 1) / batch_size`. Empty but for `questions` when nothing was answered.
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
    result["vision_ms"] = statistics.median(batch.get("vision_ms", 0.0) for batch in batches)
    result["ms_per_token"] = statistics.median(steps) if steps else None
    result["new_tokens"] = statistics.fmean(batch["new_tokens"] for batch in batches)
    decode = (result["ms_per_token"] or 0.0) * max(0.0, result["new_tokens"] - 1) / full
    result["ms_per_question"] = result["prefill_ms_per_question"] + decode
    return result | places.kept_rows(good)


def row(
    run: Run,
    baseline: Run | None = None,
    *,
    role: Role = "method",
    label: str | None = None,
    seed: int = 0,
    control: Run | None = None,
    uniform: Run | None = None,
) -> Row:
    """Score a run, with intervals and, against a baseline, paired tests and the collapse guard.

    Args:
        run: the run.
        baseline: what it is compared with, on the questions that both answered; None for the baseline itself.
        role: what the row is to the sweep.
        label: what tables call it; the run's own label if None.
        seed: of the resampling.
        control: the run with random tokens that a pruning method is also compared with.
        uniform: the run with evenly spread tokens that it is also compared with.
    """
    from vlmattn.eval import controls, stats

    intervals: Mapping[str, tuple[float, float] | None] = {}
    tests: dict[str, dict[str, Paired]] = {"baseline": {}, "control": {}, "uniform": {}}
    notes: list[str] = []
    collapsed: dict[str, str] = {}
    try:
        intervals = stats.intervals(run.tally, seed=seed)
        for name, other in (("baseline", baseline), ("control", control), ("uniform", uniform)):
            if other is None:
                continue
            first, second, lost = _answered_by_both(other, run)
            tests[name] = {pair.key: pair for pair in stats.paired(first, second, seed=seed)}
            if lost:
                notes.append(f"{lost} questions that only one of it and {other.label} answered are not in differences")
    except DataError as error:
        notes.append(str(error))
    if baseline is not None:
        collapsed = controls.collapse(baseline.tally, run.tally)
        if role == "method":
            notes += _idle(baseline, run)
    notes += _late(run.cost)
    return Row(
        label=run.label if label is None else label,
        spec=str(run.identity.get("spec", run.label)),
        folder=run.folder,
        score=run.scorer.numbers(run.tally, run.items, run.failed),
        intervals=intervals,
        cost=run.cost if baseline is None else _beside(run.cost, baseline.cost),
        failed=run.failed,
        note="; ".join(notes),
        role=role,
        invalid="; ".join(collapsed.values()),
        collapsed=tuple(collapsed),
        versus=tests["baseline"],
        metrics=run.tally.metrics,
        control="" if control is None else control.label,
        versus_control=tests["control"],
        images=run.tally.images_of(),
        uniform="" if uniform is None else uniform.label,
        versus_uniform=tests["uniform"],
    )


def below_floor(match: Match, label: str | None = None) -> Row:
    """The row of a level that a method cannot reach: no numbers, the floor in words."""
    cost = {"questions": 0, "visual_tokens": match.visual_tokens, "floor": match.floor}
    return Row(label or match.label, "", "", {}, {}, cost, note=match.floor_text, role="below floor")


def refused(label: str, why: str) -> Row:
    """The row of a method that the model cannot take: no numbers, the reason in words."""
    return Row(label, "", "", {}, {}, {"questions": 0}, note=f"refused: {why}", role="refused")


def write(out: Path, bench: Benchmark, rows: Sequence[Row], about: Mapping[str, Any]) -> Path:
    """Write summary.json, table.csv, table.md, table.tex and accuracy.svg into a folder, each atomically, and
    kept_rows.svg where tokens were dropped.

    Args:
        out: the folder of the sweep.
        bench: what was asked.
        rows: the baseline first.
        about: what else summary.json says, JSON-able.

    Returns:
        The path of summary.json, which is written last.
    """
    from vlmattn.eval import markdown, place_plots, plots, tabular

    run_records.write_text(out / CSV, tabular.csv_text(rows))
    run_records.write_text(out / MARKDOWN, markdown.page(bench, rows, about))
    run_records.write_text(out / LATEX, tabular.latex(rows))
    if any("kept_bands" in entry.cost for entry in rows):
        run_records.write_text(out / PLACES, place_plots.kept_bands(rows) + "\n")
    run_records.write_text(out / PLOT, plots.tradeoff(rows) + "\n")
    value = {
        "bench": bench.name,
        "data": {"sha256": bench.sha256, "source": bench.source, "files": dict(bench.files)},
        "profile": bench.scorer.profile,
        "prompt": bench.prompt,
        **about,
        "metrics": {
            metric.key: {name: getattr(metric, name) for name in _DESCRIBED if name != "key"}
            for metric in metrics(rows)
        },
        "runs": [entry.to_dict() for entry in rows],
    }
    path = out / SUMMARY
    run_records.write_json(path, value)
    return path


def metrics(rows: Sequence[Row], headline: bool = False) -> tuple[Metric, ...]:
    """The metrics that some row has, each once, in the order of the tables; only the headlines if asked for."""
    found = {metric.key: metric for entry in rows for metric in entry.metrics}
    return tuple(metric for metric in found.values() if metric.headline or not headline)


def title(metric: Metric) -> str:
    """Column title with the unit: "accuracy %"."""
    return f"{metric.title} %" if metric.percent else metric.title


def _answered_by_both(baseline: Run, run: Run) -> tuple[Tally, Tally, int]:
    """Tallies over the questions that both runs answered, and how many only one of them did."""
    answered = [{answer.id for answer in entry.said} for entry in (baseline, run)]
    if answered[0] == answered[1]:
        return baseline.tally, run.tally, 0
    both, asked = answered[0] & answered[1], {item.id for item in baseline.items} & {item.id for item in run.items}
    first, second = (
        entry.scorer.tally(
            [item for item in entry.items if item.id in asked],
            [answer for answer in entry.said if answer.id in both],
            asked - both,
        )
        for entry in (baseline, run)
    )
    return first, second, len(answered[0] ^ answered[1])


def _beside(cost: Mapping[str, Any], base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cost of a method that made the images smaller, beside the prompt as the baseline has it; others unchanged."""
    answered = cost.get("questions")
    if not answered or answered != base.get("questions") or cost["visual_tokens"] >= base["visual_tokens"]:
        return cost
    full = {name: base[name] for name in ("prompt_tokens", "visual_tokens", "kv_bytes_full", "prefill_macs_full")}
    return {**cost, **full, "prefill_macs_ratio": cost["prefill_macs"] / full["prefill_macs_full"]}


def _idle(baseline: Run, run: Run) -> list[str]:
    """A note on a method that says and costs what the baseline says and costs, else nothing.

    Where yes/no margins are recorded and moved, the method did something, if not enough to change an answer.
    """
    before, after = (
        {record["id"]: record for record in entry.records if record.get("status") == "ok"} for entry in (baseline, run)
    )
    both = [(before[key], after[key]) for key in before if key in after]
    spent = ("visual_per_layer", "prefill_macs", "kv_bytes")
    same = all(
        first["text"] == second["text"] and all(first["cost"][name] == second["cost"][name] for name in spent)
        for first, second in both
    )
    if not both or not same:
        return []
    still = all(
        first.get("margin") is None
        or second.get("margin") is None
        or math.isclose(first["margin"], second["margin"], rel_tol=1e-3, abs_tol=1e-3)
        for first, second in both
    )
    what = "nothing" if still else "no answer"
    return [f"changes {what} here: all answers and costs are those of {baseline.label}"]


def _late(cost: Mapping[str, Any]) -> list[str]:
    """A note on a run whose later layers see no visual token although the first ones did, else nothing."""
    layers = cost.get("visual_per_layer") or [0.0]
    if layers[-1] or not layers[0]:
        return []
    last = layers.index(0) - 1
    seen = ("layer 0", "layers 0 and 1")[last] if last < 2 else f"layers 0 to {last}"
    return [f"{seen} still saw the image; what they read stays"]


def _plain(value: Any) -> Any:
    """Nested data as JSON has it: dataclasses as objects, tuples as lists, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
