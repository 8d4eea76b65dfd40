"""The benchmark with several pictures: splits of prompts with questions, addressed by a content hash.

As in splits.py nothing is stored: a prompt is named by its kind and its number and is rendered when asked for. Which
tasks are asked for decides neither the pictures nor the other tasks' questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmattn.errors import DataError

from .render import Box
from .several import Prompt
from .several_kinds import IMAGES, KINDS, Kind
from .several_questions import ask_several
from .splits import SPLITS, content_sha256, write_lines
from .world import random_state

_CYCLE = 4
"""Prompts after which the same scenes and directions come again (several_kinds.py); turns change once per cycle."""


@dataclass(frozen=True)
class SeveralSet:
    """Prompts with several pictures, with questions.

    Attributes:
        split: name of the split.
        seed: seed within the split; 0 is the published set.
        tasks: the tasks asked for.
        kind: what is shown and asked.
        rows: one dict per question: ``question_id`` (int, from 1), ``images`` (names of two pictures) or ``video``
            (name of a video), ``text``, ``label``, ``task``.
    """

    split: str
    seed: int
    tasks: tuple[str, ...]
    kind: Kind
    rows: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def names(self) -> list[str]:
        """Names of the prompts that the questions are about, in order."""
        return list(dict.fromkeys(map(prompt_name, self.rows)))

    def _drawn(self, name: str) -> tuple[Prompt, np.ndarray, list[list[Box]]]:
        digits = name.removeprefix(f"{self.kind.name}_")
        if not digits.isdigit() or _name(self.kind, int(digits)) != name:
            raise KeyError(f"{name!r} is not a prompt's name; they look like {_name(self.kind, 1)!r}")
        rng, prompt = _sample(self.kind, self.split, self.seed, int(digits))
        return prompt, *prompt.render(rng)

    def prompt(self, name: str) -> Prompt:
        """What a prompt shows; raises KeyError for a malformed name."""
        return self._drawn(name)[0]

    def boxes(self, name: str) -> list[list[Box]]:
        """Where each object was drawn in each picture of a prompt, in pixels; raises KeyError for a malformed name."""
        return self._drawn(name)[2]

    def pictures(self, name: str) -> list[Image.Image]:
        """The images of a prompt or the frames of its video, RGB, always the same for the same kind, split, seed and
        name; raises KeyError for a malformed name."""
        return [Image.fromarray(pixels) for pixels in self._drawn(name)[1]]

    @cached_property
    def sha256(self) -> str:
        """Hash over the pixels of all pictures and over all rows, hexadecimal."""
        return content_sha256(((name, self._drawn(name)[1]) for name in self.names), self.rows)

    def save(self, folder: str | Path) -> None:
        """Write the set as files.

        ``images/*.png``, frames too; ``questions.jsonl`` with the rows; and ``scenes.json`` with kind, world, split,
        seed, tasks and hash.
        """
        target = Path(folder)
        (target / "images").mkdir(parents=True, exist_ok=True)
        for name in self.names:
            for file, picture in zip(_files(self.kind, name), self.pictures(name), strict=True):
                picture.save(target / "images" / file)
        write_lines(target / "questions.jsonl", self.rows)
        about = {"kind": self.kind.name, "world": self.kind.world.name, "split": self.split, "seed": self.seed}
        (target / "scenes.json").write_text(
            json.dumps({**about, "tasks": self.tasks, "sha256": self.sha256}, indent=2) + "\n"
        )


def prompt_name(row: Mapping[str, Any]) -> str:
    """Name of the prompt that a row of a :class:`SeveralSet` is about."""
    return str(row["video"] if "video" in row else row["images"][0].rpartition("_")[0])


def _name(kind: Kind, number: int) -> str:
    return f"{kind.name}_{number:06d}"


def _files(kind: Kind, name: str) -> list[str]:
    return [f"{name}_{place}.png" for place in range(1, kind.pictures + 1)]


def _sample(kind: Kind, split: str, seed: int, number: int) -> tuple[np.random.RandomState, Prompt]:
    return kind.sample(SPLITS[split].stream, seed, number, SPLITS[split].partner)


def benchmark_several(
    kind: str = IMAGES.name,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    prompts: int = 100,
    seed: int = 0,
) -> SeveralSet:
    """A set of prompts with questions, at most one question of each task per prompt.

    Args:
        kind: a name in ``vlmattn.scenes.several_kinds.KINDS``.
        split: a name in ``vlmattn.scenes.splits.SPLITS``.
        tasks: names in the tasks of the kind; None for all of them.
        prompts: how many prompts with at least one question.
        seed: another set of the same split; 0 is the published one.

    Raises:
        DataError: unknown kind, split or task, a repeated task, prompts below 1, or a seed below 0.
    """
    if kind not in KINDS:
        raise DataError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    shown = KINDS[kind]
    asked = shown.tasks if tasks is None else tuple(tasks)
    if split not in SPLITS:
        raise DataError(f"split={split!r}; expected one of {', '.join(SPLITS)}")
    if not asked or len(set(asked)) != len(asked) or not set(asked) <= set(shown.tasks):
        raise DataError(f"tasks={asked!r}; expected different ones of {', '.join(shown.tasks)}")
    if prompts < 1 or seed < 0:
        raise DataError(f"prompts={prompts}, seed={seed}; expected at least 1 and at least 0")
    stream = shown.world.stream + shown.stream + SPLITS[split].stream
    rows: list[dict[str, Any]] = []
    found, number = 0, 0
    while found < prompts:
        number += 1
        name = _name(shown, number)
        pictures = {"video": name} if shown.video else {"images": _files(shown, name)}
        _, prompt = _sample(shown, split, seed, number)
        before = len(rows)
        for task in asked:
            rng = random_state(stream, seed, number, shown.tasks.index(task))
            question = ask_several(rng, prompt, task, number // _CYCLE)
            if question is not None:
                row = {"question_id": len(rows) + 1, **pictures, "text": question.text, "label": question.answer}
                rows.append({**row, "task": task})
        found += len(rows) > before
    return SeveralSet(split, seed, asked, shown, rows)
