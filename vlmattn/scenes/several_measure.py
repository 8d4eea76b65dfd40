"""Accuracy on prompts with several pictures, by real batched ``generate`` of the stock model and its processor."""

from __future__ import annotations

from typing import Any

from .measure import Row, accuracy, greedy_answers
from .several_kinds import KINDS, Kind
from .several_splits import SeveralSet, benchmark_several, prompt_name


def several_chat_prompt(processor: Any, kind: Kind, question: str) -> str:
    """The chat template's text for the pictures of a kind, in order, and one question."""
    shown = [{"type": "video" if visual.frames else "image"} for visual in kind.visuals]
    content = [*shown, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def several_answers(model: Any, processor: Any, prompts: SeveralSet, rows: list[Row], batch: int = 50) -> list[str]:
    """Greedy answers to rows of a set, one string per row, without special tokens.

    Args:
        model: a scenes model in evaluation mode that takes the kind's visual inputs.
        processor: its processor.
        prompts: the set.
        rows: some of its rows.
        batch: prompts per call of ``generate``.
    """
    kind = prompts.kind
    pictures = {name: prompts.pictures(name) for name in dict.fromkeys(map(prompt_name, rows))}

    def inputs(part: list[Row]) -> Any:
        texts = [several_chat_prompt(processor, kind, row["text"]) for row in part]
        shown = [pictures[prompt_name(row)] for row in part]
        visual = {"videos": shown} if kind.video else {"images": shown}
        return processor(text=texts, **visual, padding=True, return_tensors="pt")

    return greedy_answers(model, processor, inputs, rows, batch)


def measure_several(
    model: Any, processor: Any, prompts: int, seed: int, split: str = "test"
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy on exact match by kind of prompt and task.

    Args:
        model: a scenes model in evaluation mode that takes several images and videos.
        processor: its processor.
        prompts: prompts of each kind, with one question of each task that they can carry.
        seed: seed of the split.
        split: a name in ``vlmattn.scenes.splits.SPLITS``.

    Returns:
        ``n``, the number of questions, and ``accuracy`` for each task of each kind; a task that no prompt can carry is
        left out.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, kind in KINDS.items():
        data = benchmark_several(name, split, prompts=prompts, seed=seed)
        right: dict[str, list[bool]] = {task: [] for task in kind.tasks}
        for row, answer in zip(data.rows, several_answers(model, processor, data, data.rows), strict=True):
            right[row["task"]].append(answer == row["label"])
        found[name] = {task: accuracy(answers) for task, answers in right.items() if answers}
    return found
