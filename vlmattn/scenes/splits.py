"""The benchmark: splits of scenes with questions, addressed by a content hash.

A picture is named by its number in its split and is rendered from the seed when asked for, so nothing is stored. Which
tasks are asked for decides neither the pictures nor the other tasks' questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmattn.errors import DataError

from .questions import EXISTENCE_TASKS, OTHER_TASKS, PAIR_TASKS, ask, ask_pair, existence, negatives
from .render import Box, render
from .world import WORLD_2, WORLDS, Scene, World, absent_partners, random_state, sample_scene


class Split(NamedTuple):
    """First word of a split's random keys, and how likely a type brings its partner (None: as in training)."""

    stream: int
    partner: float | None


SPLITS = {
    "val": Split(1, 0.4),
    "test": Split(2, 0.4),
    "typical": Split(3, None),
    "counterfactual": Split(4, 0.0),
}
"""``test`` is the default; ``typical`` has the partner statistics of training; in ``counterfactual`` no type brings its
partner. Training draws from streams of its own (packing.py) and is never materialised."""
TASKS = EXISTENCE_TASKS + OTHER_TASKS + PAIR_TASKS
"""The tasks of the published set; the places in it key the random streams."""
PAIRS_TASK = "pairs"
"""MME's form: one question about an object that is there and one about an object that is not."""
ALL_TASKS = (*TASKS, PAIRS_TASK)
"""Every task a benchmark can hold."""
MAX_PAIRS = 3
"""POPE asks six questions per image and category: three objects that are there and three that are not."""

_POSITIVES_KEY = 1000
_PAIRS_KEY = 1001


def _name(number: int) -> str:
    return f"scene_{number:06d}.png"


@dataclass(frozen=True)
class SceneSet:
    """Scenes with questions.

    Attributes:
        split: name of the split.
        seed: seed within the split; 0 is the published set.
        tasks: the tasks asked for.
        world: what the scenes look like.
        rows: one dict per question: ``question_id`` (int, from 1), ``image``, ``text``, ``label``, ``task``.
    """

    split: str
    seed: int
    tasks: tuple[str, ...]
    world: World
    rows: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def names(self) -> list[str]:
        """Names of the pictures that the questions are about, in order."""
        return list(dict.fromkeys(row["image"] for row in self.rows))

    def _drawn(self, name: str) -> tuple[Scene, np.ndarray, list[Box]]:
        digits = name.removeprefix("scene_").removesuffix(".png")
        if not digits.isdigit() or _name(int(digits)) != name:
            raise KeyError(f"{name!r} is not a scene's name; they look like {_name(1)!r}")
        rng, scene = _scene(self.world, self.split, self.seed, int(digits))
        pixels, boxes = render(rng, scene)
        return scene, pixels, boxes

    def scene(self, name: str) -> Scene:
        """The objects of a picture; raises KeyError for a malformed name."""
        return self._drawn(name)[0]

    def boxes(self, name: str) -> list[Box]:
        """Where each object of a picture was drawn, in pixels; raises KeyError for a malformed name."""
        return self._drawn(name)[2]

    def image(self, name: str) -> Image.Image:
        """A picture, RGB, always the same for the same world, split, seed and name; KeyError for a malformed name."""
        return Image.fromarray(self._drawn(name)[1])

    def gold(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What scoring the answer to a row needs beyond its label.

        Returns:
            For ``caption`` {"objects": names of all objects, in the scene's order}; for ``loc`` {"box": [x0, y0, x1,
            y1] of the object, as shares of width and height}; else nothing. No part of `rows` or of the hash, since
            the picture decides it.
        """
        if row["task"] == "caption":
            return {"objects": [item.name for item in self.scene(row["image"]).objects]}
        if row["task"] == "loc":
            scene, _, boxes = self._drawn(row["image"])
            place = [item.cell for item in scene.objects].index(self.world.cell_names.index(row["label"]))
            box = boxes[place]
            corners = (box.left, box.top, box.left + box.width, box.top + box.height)
            height, width = scene.world.size
            return {"box": [corner / side for corner, side in zip(corners, (width, height) * 2, strict=True)]}
        return {}

    @cached_property
    def sha256(self) -> str:
        """Hash over the pixels of all pictures and over all rows, hexadecimal."""
        return content_sha256(((name, self._drawn(name)[1]) for name in self.names), self.rows)

    def save(self, folder: str | Path) -> None:
        """Write the set as files.

        ``images/*.png``; for each existence task ``scenes_pope_<category>.json`` in POPE's form (JSON lines of
        question_id, image, text, label); the other tasks in ``questions.jsonl``, which also names the task; and
        ``scenes.json`` with world, split, seed and hash.
        """
        target = Path(folder)
        (target / "images").mkdir(parents=True, exist_ok=True)
        for name in self.names:
            self.image(name).save(target / "images" / name)
        for task in self.tasks:
            if task in EXISTENCE_TASKS:
                rows = [{k: v for k, v in row.items() if k != "task"} for row in self.rows if row["task"] == task]
                write_lines(target / f"scenes_pope_{task.removeprefix('exist-')}.json", rows)
        others = [row for row in self.rows if row["task"] not in EXISTENCE_TASKS]
        if others:
            write_lines(target / "questions.jsonl", others)
        about = {"world": self.world.name, "split": self.split, "seed": self.seed, "tasks": self.tasks}
        about["sha256"] = self.sha256
        (target / "scenes.json").write_text(json.dumps(about, indent=2) + "\n")


def content_sha256(pictures: Iterable[tuple[str, np.ndarray]], rows: list[dict[str, Any]]) -> str:
    """Hexadecimal hash over names with their pixels, in order, and over rows."""
    digest = hashlib.sha256()
    for name, pixels in pictures:
        digest.update(name.encode() + pixels.tobytes())
    digest.update(json.dumps(rows, sort_keys=True).encode())
    return digest.hexdigest()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _scene(world: World, split: str, seed: int, number: int) -> tuple[np.random.RandomState, Scene]:
    """A scene and the generator to render it with."""
    stream, partner = SPLITS[split]
    rng = random_state(world.stream + stream, seed, number)
    return rng, sample_scene(rng, world, partner)


def _existence_rows(scene: Scene, key: tuple[int, int, int], task: str) -> list[tuple[str, str]]:
    """Question and label, a yes and a no in turn; the positives are the same in all categories.

    A scene carries as many pairs as it has objects and absent partners, at most three, so that every category is
    equally long and balanced; a scene without an absent partner carries none.
    """
    pairs = min(MAX_PAIRS, len(scene.objects), len(absent_partners(scene)))
    if not pairs:
        return []
    order = random_state(*key, _POSITIVES_KEY).permutation(len(scene.objects))[:pairs]
    rng = random_state(*key, TASKS.index(task))
    wrong = negatives(rng, scene, task.removeprefix("exist-"), pairs)
    rows = []
    for index, absent in zip(order, wrong, strict=True):
        rows += [(existence(scene.objects[int(index)].type), "yes"), (existence(absent), "no")]
    return rows


def _pair_rows(scene: Scene, key: tuple[int, int, int]) -> list[tuple[str, str]]:
    """An object that is there and one that is not: an absent partner, or any absent type where there is none."""
    rng = random_state(*key, _PAIRS_KEY)
    present = scene.types[rng.randint(len(scene.types))]
    [absent] = negatives(rng, scene, "adversarial") or negatives(rng, scene, "random")
    return [(existence(present), "yes"), (existence(absent), "no")]


def _questions(scene: Scene, key: tuple[int, int, int], task: str) -> list[tuple[str, str]]:
    """Questions with labels that a scene carries for a task; possibly none."""
    if task in EXISTENCE_TASKS:
        return _existence_rows(scene, key, task)
    if task == PAIRS_TASK:
        return _pair_rows(scene, key)
    if task == "digits" and not scene.plates:
        return []
    rng = random_state(*key, TASKS.index(task))
    if task in PAIR_TASKS:
        return [(question.text, question.answer) for question in ask_pair(rng, scene, task) or ()]
    question = ask(rng, scene, task)
    return [] if question is None else [(question.text, question.answer)]


def benchmark(
    split: str = "test",
    tasks: Sequence[str] = ("exist-random", "exist-popular", "exist-adversarial"),
    images: int = 100,
    seed: int = 0,
    world: str = WORLD_2.name,
) -> SceneSet:
    """A set of scenes with questions.

    Args:
        split: a name in SPLITS.
        tasks: names in ALL_TASKS. Existence tasks ask up to three yes and three no per picture, ``pairs`` and
            ``pair-...`` one yes and one no, the others one question.
        images: how many pictures with at least one question.
        seed: another set of the same split; 0 is the published one.
        world: a name in ``vlmattn.scenes.world.WORLDS``.

    Raises:
        DataError: unknown world, split or task, a repeated task, or images below 1.
    """
    if world not in WORLDS:
        raise DataError(f"world={world!r}; expected one of {', '.join(WORLDS)}")
    if split not in SPLITS:
        hint = "; training scenes are drawn on the fly and never listed" if split == "train" else ""
        raise DataError(f"split={split!r}; expected one of {', '.join(SPLITS)}{hint}")
    unknown = [task for task in tasks if task not in ALL_TASKS]
    if unknown or not tasks or len(set(tasks)) != len(tasks):
        raise DataError(f"tasks={tuple(tasks)!r}; expected different ones of {', '.join(ALL_TASKS)}")
    if images < 1 or seed < 0:
        raise DataError(f"images={images}, seed={seed}; expected at least 1 and at least 0")
    look = WORLDS[world]
    stream = look.stream + SPLITS[split].stream
    rows: list[dict[str, Any]] = []
    found, number = 0, 0
    while found < images:
        number += 1
        _, scene = _scene(look, split, seed, number)
        before = len(rows)
        for task in tasks:
            for text, label in _questions(scene, (stream, seed, number), task):
                row = {"question_id": len(rows) + 1, "image": _name(number), "text": text, "label": label, "task": task}
                rows.append(row)
        found += len(rows) > before
    return SceneSet(split, seed, tuple(tasks), look, rows)
