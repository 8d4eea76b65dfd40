"""The rows of a sweep as one page of markdown: accuracy per group of tasks, tests against the controls, cost.

It is what the documentation shows of a sweep. Every number is in summary.json, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmattn.eval import tabular
from vlmattn.eval.items import Benchmark
from vlmattn.eval.stats import LEVEL
from vlmattn.eval.summary import Row, metrics
from vlmattn.eval.tally import Metric


def page(bench: Benchmark, rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The page: how it was made, the table, how to read it, what the model refuses.

    Args:
        bench: what was asked.
        rows: the baseline first.
        about: `command`, `model` and `versions` of the sweep, as far as they are known.
    """
    command = about.get("command")
    versions = ", ".join(f"{name} {value}" for name, value in about.get("versions", {}).items())
    lines = [f"# {bench.name} on {about.get('model', 'a model')}", ""]
    lines += [f"Made by `{command}`.", ""] if command else []
    lines += [f"- {bench.source}; {rows[0].cost.get('questions', 0)} questions under each method"]
    lines += [f"- {versions}; {about.get('platform', '')}"] if versions else []
    lines += ["", *table(rows, bench.scorer.tasks), "", *(f"- {note}" for note in notes(rows))]
    refused = [f"- `{row.label}`: {row.note}" for row in rows if row.role == "refused"]
    lines += ["", "## Not in the table", "", *refused] if refused else []
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], tasks: Mapping[str, str]) -> list[str]:
    """The lines of the table; methods that the model refuses are left out.

    Args:
        rows: the baseline first.
        tasks: `Scorer.tasks`.
    """
    shown = [row for row in rows if row.role != "refused"]
    columns = _columns(shown, tasks)
    extra = tabular.extra_columns(shown)
    names = [f"{title} %" if metric.percent else title for metric, title in columns]
    head = ["method", "visual tokens", *names, "prefill MACs", "KV cache", *extra]
    lines = [head, ["---"] * len(head)]
    for row in shown:
        cells = [_task(row, metric) for metric, _ in columns]
        costs = [_share(row, rows[0], "prefill_macs"), _share(row, rows[0], "kv_bytes")]
        more = [text(row.cost).replace(" (", "<br>(") for text in extra.values()]
        lines.append([f"`{tabular.mark(row)}`{_role(row)}", tabular.tokens_text(row.cost), *cells, *costs, *more])
    return ["| " + " | ".join(line) + " |" for line in lines]


def notes(rows: Sequence[Row]) -> list[str]:
    """How the table is to be read."""
    base = rows[0].label
    found = [
        f"In brackets the difference to `{base}`, below it those to as many random (r) and evenly spread (u) tokens "
        f"from the same layer on. *: p < {LEVEL:g} in a paired test over images, after Holm's correction.",
        f"MACs and KV cache are shares of those of `{base}`, and exact.",
        *tabular.timing_notes(rows),
    ]
    found += [f"{tabular.mark(row)}: not comparable, {row.invalid}." for row in rows if row.invalid]
    found += [f"`{row.label}`: {row.note}." for row in rows if row.role == "below floor"]
    return found


def _columns(rows: Sequence[Row], tasks: Mapping[str, str]) -> list[tuple[Metric, str]]:
    """The metrics that are shown and what they are called."""
    known = {metric.key: metric for metric in metrics(rows)}
    named = [(known[key], title) for key, title in tasks.items() if key in known]
    return named or [(metric, metric.title) for metric in metrics(rows, headline=True)]


def _task(row: Row, metric: Metric) -> str:
    """ "84.2 (−1.2*)<br>r +3.0*, u +0.4": value, and the differences to the baseline and to the controls."""
    value = row.value(metric.key)
    if value is None:
        return "-"
    text = tabular.number_text(value, metric.percent)
    if (pair := row.versus.get(metric.key)) is not None:
        text += f" ({tabular.difference_text(pair, metric.percent)})"
    others = {"r": row.versus_control, "u": row.versus_uniform}
    told = [
        f"{name} {tabular.difference_text(tests[metric.key], metric.percent)}"
        for name, tests in others.items()
        if metric.key in tests
    ]
    return text + (f"<br>{', '.join(told)}" if told else "")


def _share(row: Row, base: Row, name: str) -> str:
    """A cost as a share of the baseline's."""
    if not row.cost.get("questions") or not base.cost.get(name):
        return "-"
    return f"{100 * row.cost[name] / base.cost[name]:.0f} %"


def _role(row: Row) -> str:
    return " (control)" if row.role == "control" else ""
