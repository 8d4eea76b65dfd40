"""Position and attribute questions on the embedded scenes, scored by exact match.

Existence survives pruning in a small model as soon as the words have read the image; where things are and what the
printed digits say does not. These tasks show what pruning costs. Results say something about the embedded model only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vlmattn.eval.benchmarks.pope import match
from vlmattn.eval.items import Item

TASKS = ("loc", "cell", "digits")
TASK_NAMES = {"loc": "where an object is", "cell": "what is in a place", "digits": "read the digits"}


def normal(text: str) -> str:
    """What is compared: lower case, without blanks and without a final period."""
    return "".join(text.lower().split()).rstrip(".")


def score(items: Sequence[Item], answers: Iterable[tuple[str, str]], failed: Collection[str] = ()) -> dict[str, Any]:
    """Exact-match accuracy per task.

    Returns:
        `tasks`: per task `accuracy`, `right`, `total`, `failed`; `mean_accuracy` over tasks; `failed`; `undefined`:
        tasks without an answered item (accuracy 0).
    """
    pairs = match(items, answers, failed)
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(item.group for item in items):
        marks = [is_right(item, text) for item, text in pairs if item.group == task]
        lost = sum(item.group == task for item in items if item.id in failed)
        accuracy = sum(marks) / len(marks) if marks else 0.0
        tasks[task] = {"accuracy": accuracy, "right": sum(marks), "total": len(marks), "failed": lost}
    mean = sum(entry["accuracy"] for entry in tasks.values()) / len(tasks) if tasks else 0.0
    return {
        "profile": "exact",
        "tasks": tasks,
        "mean_accuracy": mean,
        "failed": sum(entry["failed"] for entry in tasks.values()),
        "undefined": [task for task, entry in tasks.items() if not entry["total"]],
    }


def is_right(item: Item, text: str) -> bool:
    """Whether the raw text is the label, blanks and case aside."""
    return normal(text) == normal(item.label)


def counts_by_image(
    items: Sequence[Item], answers: Iterable[tuple[str, str]], failed: Collection[str] = ()
) -> dict[str, dict[str, tuple[int, int]]]:
    """image -> task -> (right, all): what the image-clustered bootstrap resamples."""
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for item, text in match(items, answers, failed):
        right, total = table.setdefault(item.image, {}).get(item.group, (0, 0))
        table[item.image][item.group] = (right + is_right(item, text), total + 1)
    return table
