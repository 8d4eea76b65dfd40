"""Training samples with several pictures: one prompt, the questions that share it, in arrays of fixed shape."""

from __future__ import annotations

import numpy as np

from .packing import IGNORE, TRAINING_STREAM, Batch, Packed, Slot, place
from .several import Prompt
from .several_kinds import Course, Kind
from .several_questions import ask_several


def pack_several(rng: np.random.RandomState, prompt: Prompt, course: Course) -> Packed:
    """Ask the tasks of a course and lay the questions out in slots; what the prompt cannot carry is left out.

    Tasks that stand next to each other take turns at the first and the second scene, and at yes and no.
    """
    ids = np.zeros(course.packed_length, dtype=np.int64)
    weights = np.zeros(course.packed_length, dtype=np.float32)
    cells = np.full(course.packed_length, IGNORE, dtype=np.int64)
    slots: list[Slot] = []
    group = 0
    turn = int(rng.randint(2))
    for tasks, (capacity, length) in zip(course.groups, course.slot_groups, strict=True):
        at = group
        for task in tasks:
            turn += 1
            question = ask_several(rng, prompt, task, turn)
            if question is not None:
                slots.append(place(question, at, length, ids, weights, cells))
                at += length
        group += capacity * length
    return Packed(ids, weights, cells, tuple(slots))


def several_batch(kind: Kind, seed: int, first: int, count: int, anchors: int | None = None) -> Batch:
    """Training samples number ``first`` to ``first + count - 1`` of the endless stream of a seed.

    A sample depends on the kind, the seed and its number alone, as in :func:`.packing.training_batch`.

    Args:
        kind: what is shown and asked.
        seed: the training seed.
        first: number of the first sample.
        count: batch size.
        anchors: largest number of anchors (the curriculum) of images; None for the world's.

    Returns:
        As for one picture, except for the pixels: (count, pictures, height, width, 3) uint8, in the order of the images
        or frames.
    """
    most = min(anchors or kind.world.max_anchors, kind.world.max_anchors)
    pixels, packed = [], []
    for number in range(first, first + count):
        rng, prompt = kind.sample(TRAINING_STREAM, seed, number, anchors=(1, most))
        pixels.append(prompt.render(rng)[0])
        packed.append(pack_several(rng, prompt, kind.course))
    return Batch(
        np.stack(pixels),
        np.stack([sample.ids for sample in packed]),
        np.stack([sample.weights for sample in packed]),
        np.stack([sample.cells for sample in packed]),
    )
