"""Run folders written by hand: yes/no and digit questions about a few images, with made-up answers and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmattn.eval.items import Item
from vlmattn.eval.records import RunFolder

COST = {
    "prompt_tokens": 20,
    "visual_tokens": 16,
    "visual_per_layer": [16, 16, 4, 4],
    "kv_bytes": 50.0,
    "kv_bytes_full": 100.0,
    "prefill_macs": 30.0,
    "prefill_macs_full": 60.0,
}
TIME = {"batch": 0, "questions": 8, "prefill_ms": 10.0, "decode_ms": 6.0, "new_tokens": 3}
ITEMS = tuple(
    item
    for number in range(12)
    for item in (
        Item(f"random/{number}", f"{number}.png", f"Is there a cat in picture {number}?", "yes", "random"),
        Item(f"popular/{number}", f"{number}.png", f"Is there a dog in picture {number}?", "no", "popular"),
        Item(f"digits/{number}", f"{number}.png", "What digits are shown?", f"{number} 7", "digits"),
    )
)


def right(item: Item) -> str:
    """The right answer to everything."""
    return item.label


def answering(**wrong: str) -> Callable[[Item], str]:
    """Right answers but for some: `answering(random_3="no")`."""
    return lambda item: wrong.get(item.id.replace("/", "_"), item.label)


def identity(**changes: Any) -> dict[str, Any]:
    """The identity of a run of "none" on the scenes; `data={"limit": 3}` changes a part."""
    found: dict[str, Any] = {
        "spec": "none",
        "sink_dims": None,
        "model": {"name": "toy", "fingerprint": "f00d", "dtype": "float32"},
        "device": "cpu",
        "bench": "scenes",
        "data": {"sha256": "a" * 64, "limit": None},
        "prompt": "bare",
        "decode": {"do_sample": False, "num_beams": 1, "max_new_tokens": 16, "batch_size": 8},
        "versions": {"vlmattn": "1", "torch": "2", "transformers": "5"},
    }
    for name, value in changes.items():
        found[name] = {**found[name], **value} if isinstance(value, Mapping) else value
    return found


def write(
    folder: Path,
    say: Callable[[Item], str | None] = right,
    *,
    items: tuple[Item, ...] = ITEMS,
    questions: int | None = None,
    done: bool = True,
    **changes: Any,
) -> Path:
    """Write a run folder.

    Args:
        folder: where.
        say: the answer to an item; None is a failed question.
        items: what is asked.
        questions: what `run.json` says how many there are; all of `items` if None, nothing if 0.
        done: whether the run came to its end.
        changes: of `identity`.
    """
    info: dict[str, Any] = {"profile": "official", "pictures": {"scenes": "test", "world": "2"}}
    if questions != 0:
        info["questions"] = len(items) if questions is None else questions
    with RunFolder(folder, identity(**changes), info) as out:
        out.append([record(item, say(item)) for item in items])
        if done:
            out.write_cost({"peak_memory_bytes": None})
    return folder


def record(item: Item, text: str | None) -> dict[str, Any]:
    """What the runner writes about a question."""
    found: dict[str, Any] = {
        "id": item.id,
        "image": item.image,
        "group": item.group,
        "question": item.question,
        "label": item.label,
    }
    if item.gold:
        found["gold"] = dict(item.gold)
    if text is None:
        return found | {"status": "failed", "error": f"{item.image}: broken"}
    return found | {"prompt": item.question, "status": "ok", "text": text, "cost": COST, "time": TIME}
