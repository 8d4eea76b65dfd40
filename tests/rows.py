"""Rows of a sweep with made-up numbers, for tables and plots."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmattn.eval.stats import Paired
from vlmattn.eval.summary import Role, Row
from vlmattn.eval.tally import Better, Metric

TITLES = {
    "mean_accuracy": "accuracy",
    "mean_f1": "F1",
    "color.accuracy": "color accuracy",
    "count.accuracy": "count accuracy",
    "digits.accuracy": "digits accuracy",
    "pairs.accuracy_plus": "pairs acc+",
    "loc.hit": "loc hit rate",
    "caption.chair_s": "caption CHAIR_s",
    "caption.length": "caption length",
    "random.f1": "random F1",
}


def metric(key: str) -> Metric:
    """A metric whose value nobody computes."""
    group = "" if key.startswith("mean") else key.split(".")[0]
    better: Better = "lower" if "chair" in key else "neither" if "length" in key else "higher"
    return Metric(
        key=key,
        title=TITLES[key],
        group=group,
        groups=(group or "random",),
        headline=key != "random.f1",
        better=better,
        percent="length" not in key,
        of_marks=False,
        raw=lambda sums: np.zeros(sums.shape[:-1]),
    )


def cost(average: float, ms: float) -> dict[str, Any]:
    """What `cost_of` returns for a model with 144 visual tokens."""
    return {
        "questions": 600,
        "visual_per_layer": [average] * 4,
        "average_visual_tokens": average,
        "prompt_tokens": 160.0,
        "visual_tokens": 144.0,
        "kv_bytes": 2048.0 * (average + 16),
        "kv_bytes_full": 2048.0 * 160,
        "prefill_macs": 1e6 * (average + 16),
        "prefill_macs_full": 1e6 * 160,
        "prefill_macs_ratio": (average + 16) / 160,
        "batch_size": 16,
        "prefill_ms": 12 * ms,
        "prefill_ms_per_question": 0.75 * ms,
        "vision_ms": 8.0,
        "ms_per_token": 0.5,
        "new_tokens": 3.0,
        "ms_per_question": ms,
        "peak_memory_bytes": None,
    }


def row(label: str, level: float, average: float, ms: float, role: Role = "method", **more: Any) -> Row:
    """A row whose metrics all lie about `level`."""
    values = {key: level + 0.01 * number for number, key in enumerate(TITLES)} | {"caption.length": 38.24}
    versus = {}
    if role != "baseline":
        versus = {
            key: paired(key, value - (38.24 if "length" in key else 0.9), 0.001 if value < 0.8 else 0.6)
            for key, value in values.items()
        }
    made: dict[str, Any] = {
        "spec": label,
        "folder": f"runs/{label}",
        "score": {"values": values, "undefined": [], "unparsed": 0, "failed": 0, "groups": {}},
        "intervals": {key: (value - 0.03, value + 0.025) for key, value in values.items()},
        "cost": cost(average, ms),
        "metrics": tuple(map(metric, TITLES)),
        "versus": versus,
    }
    return Row(label=label, role=role, **{**made, **more})


def paired(key: str, difference: float, p: float) -> Paired:
    """A paired test with that outcome."""
    about = metric(key)
    return Paired(
        key=key,
        title=about.title,
        group=about.group,
        headline=about.headline,
        better=about.better,
        percent=about.percent,
        first=0.9,
        second=0.9 + difference,
        difference=difference,
        interval=(difference - 0.02, difference + 0.02),
        p=p / 2,
        test="bootstrap",
        p_holm=p,
        mcnemar=None,
        images=200,
        standard_error=0.01,
        detectable=None,
    )


def sweep() -> list[Row]:
    """A baseline, two methods at two budgets, a collapsed row and controls."""
    fastv, spread = "fastv(keep={}, before_layer=2)", "uniform(keep={}, mode='2d')"
    return [
        row("none", 0.9, 144, 9.1, "baseline"),
        row(fastv.format(0.5), 0.88, 108, 7.2),
        row(fastv.format(0.25), 0.79, 90, 6.4),
        row(spread.format(0.5), 0.84, 72, 5.4),
        row(spread.format(0.25), 0.71, 36, 4.0, invalid="caption: mean length 62.0 words, 38.2 without (+62 %)"),
        row("fastv(keep=0.5, before_layer=2) + var", 0.885, 108, 7.4),
        row("random(keep=0.5, before_layer=2)", 0.83, 108, 7.1, "control"),
        row("random(keep=0.25, before_layer=2)", 0.69, 90, 6.3, "control"),
        row("noimage(before_layer=2)", 0.5, 72, 5.0, "control"),
        row("threshold(logit +0.37)", 0.905, 144, 9.1, "control", spec="none"),
    ]
