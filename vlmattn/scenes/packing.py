"""Training samples: one picture, about twenty questions that share it, in arrays of fixed shape.

The questions of a picture do not see each other: each sits in a slot of its own behind the shared image prefix and its
positions restart after the image, so a packed forward equals one ordinary forward per question at a fraction of its
cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .questions import Question, ask
from .render import render
from .text import ASSISTANT_ID, EOS_ID, encode
from .versions import Lessons, Version
from .world import HIDDEN_OPACITY, Scene, random_state, sample_scene

IGNORE = -100

TASK_WEIGHTS = {"loc": 3.0, "rel": 3.0, "cell": 3.0, "color": 3.0, "digits": 4.0, "caption": 0.5}
"""Loss weight of an answer token by task; 2.0 for the others."""
END_WEIGHT = 0.1
HIDDEN_SHARE, ABOUT_HIDDEN = 0.2, 0.5
"""Last stage: probability that a partner is hidden, and that a question with the answer yes is about a hidden
object."""
ADVERSARIAL_SHARE = 0.125
"""Probability that a training negative asks for an absent partner. Together with FAINT_PROBABILITY and PARTNER_STRENGTH
it decides how much the trained model hallucinates: every such negative teaches distrust of the prior."""
_TRAINING_NEGATIVES = ("exist-random", "exist-binding", "exist-frequency")
_PER_OBJECT_TASKS = ("loc", "cell", "exist-yes", "next")


class Slot(NamedTuple):
    """Where a packed question lies: its task, the first token of its answer and the end token's place."""

    task: str
    answer: int
    end: int


@dataclass(frozen=True)
class Packed:
    """Questions of one picture.

    Attributes:
        ids: token ids, (packed_length,) int64, 0 where empty.
        weights: loss weight of each token as a target, (packed_length,) float32.
        cells: cell of the object whose name ends at a token, the number of cells if it is absent, or IGNORE;
            (packed_length,) int64.
        slots: the questions in order.
    """

    ids: np.ndarray
    weights: np.ndarray
    cells: np.ndarray
    slots: tuple[Slot, ...]


class Batch(NamedTuple):
    """Stacked samples: pixels (B, H, W, 3) uint8, and ids, weights, cells (B, packed_length) as in Packed."""

    pixels: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    cells: np.ndarray


@lru_cache(maxsize=100_000)
def _mention_end(text: str, name: str) -> int:
    """Index of the token of ``text`` that ends the first occurrence of ``name``."""
    words, part = encode(text), encode(name)
    starts = [i for i in range(len(words)) if words[i : i + len(part)] == part]
    return starts[0] + len(part) - 1


def training_tasks(
    rng: np.random.RandomState, scene: Scene, lessons: Lessons, adversarial: float = ADVERSARIAL_SHARE
) -> tuple[list[str], list[str], list[str]]:
    """Tasks to ask of a training scene, one list per slot group."""
    short = list(lessons.short)
    for _ in range(lessons.negatives):
        trap = rng.random_sample() < adversarial
        short.append("exist-adversarial" if trap else _TRAINING_NEGATIVES[rng.randint(len(_TRAINING_NEGATIVES))])
    for _ in range(lessons.digits):
        short.append("digits" if scene.plates or rng.random_sample() < 0.15 else "count")
    return short, list(lessons.relations), ["caption"]


def pack(
    rng: np.random.RandomState,
    scene: Scene,
    tasks: tuple[list[str], list[str], list[str]],
    lessons: Lessons,
    about_hidden: float = 0.0,
) -> Packed:
    """Ask the tasks of a scene and lay the questions out in slots; a task that the scene cannot carry is left out.

    With probability ``about_hidden`` a question whose answer is yes is about an object that can hardly be seen, if
    there is one.
    """
    hidden = [i for i, item in enumerate(scene.objects) if about_hidden and item.opacity < HIDDEN_OPACITY[1]]
    ids = np.zeros(lessons.packed_length, dtype=np.int64)
    weights = np.zeros(lessons.packed_length, dtype=np.float32)
    cells = np.full(lessons.packed_length, IGNORE, dtype=np.int64)
    slots: list[Slot] = []
    start_of_group = 0
    turn = int(rng.randint(60))
    plate = 0
    for (capacity, length), names in zip(lessons.slot_groups, tasks, strict=True):
        used = 0
        for task in names:
            turn += 1
            index = turn if task in _PER_OBJECT_TASKS else None
            if hidden and task == "exist-yes" and rng.random_sample() < about_hidden:
                index = hidden[rng.randint(len(hidden))]
            if task == "digits":
                index, plate = plate, plate + 1
            question = ask(rng, scene, task, index)
            if question is None:
                continue
            if used == capacity:
                raise ValueError(f"{len(names)} tasks do not fit into {capacity} slots")
            slots.append(place(question, start_of_group + used * length, length, ids, weights, cells))
            used += 1
        start_of_group += capacity * length
    return Packed(ids, weights, cells, tuple(slots))


def place(question: Question, at: int, length: int, ids: np.ndarray, weights: np.ndarray, cells: np.ndarray) -> Slot:
    """Write one question with its answer into the slot that begins at ``at``."""
    words, answer = encode(question.text), encode(question.answer)
    tokens = (*words, ASSISTANT_ID, *answer, EOS_ID)
    if len(tokens) > length:
        raise ValueError(f"{question.text!r} with its answer has {len(tokens)} tokens, its slot {length}")
    first, end = at + len(words) + 1, at + len(tokens) - 1
    ids[at : at + len(tokens)] = tokens
    weight = TASK_WEIGHTS.get(question.task, 2.0)
    weights[first:end] = weight
    weights[end] = weight if question.task == "caption" else END_WEIGHT
    for name, cell in question.mentions:
        cells[at + _mention_end(question.text, name)] = cell
    return Slot(question.task, first, end)


def training_batch(
    version: Version,
    seed: int,
    first: int,
    count: int,
    anchors: int | None = None,
    habit: bool = False,
    size: tuple[int, int] | None = None,
) -> Batch:
    """Training samples number ``first`` to ``first + count - 1`` of the endless stream of a seed.

    A sample depends on the seed and its number alone, not on the batch size or the number of processes, which is what
    makes a resumed run continue the same stream.

    Args:
        version: its world and its lessons.
        seed: the training seed.
        first: number of the first sample.
        count: batch size.
        anchors: largest number of anchors (the curriculum); None for the world's.
        habit: samples of the last stage: partners are often hidden, questions with the answer yes are often about
            them, and nobody asks for an absent partner.
        size: height and width of the pictures; None for the world's (first) size.
    """
    hidden, about_hidden, adversarial = (HIDDEN_SHARE, ABOUT_HIDDEN, 0.0) if habit else (0.0, 0.0, ADVERSARIAL_SHARE)
    world, lessons = version.world.sized(size or version.world.size), version.lessons
    most = min(anchors or world.max_anchors, world.max_anchors)
    pixels, packed = [], []
    for number in range(first, first + count):
        rng = random_state(world.stream + TRAINING_STREAM, seed, number)
        scene = sample_scene(rng, world, anchors=(1, most), hidden=hidden)
        pixels.append(render(rng, scene)[0])
        packed.append(pack(rng, scene, training_tasks(rng, scene, lessons, adversarial), lessons, about_hidden))
    return Batch(
        np.stack(pixels),
        np.stack([sample.ids for sample in packed]),
        np.stack([sample.weights for sample in packed]),
        np.stack([sample.cells for sample in packed]),
    )


PRETRAINING_STREAM, TRAINING_STREAM, MONITOR_STREAM = 101, 102, 103
"""First word of the random keys of the two training stages and of the scenes that the curve is measured on; the splits
of the benchmark use other words (splits.py), so training and test scenes are disjoint whatever the seeds."""
