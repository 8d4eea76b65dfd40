"""The kinds of prompts with several pictures: what is shown, in which pictures, and what is asked in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .several import DIRECTIONS, Prompt, sample_images, sample_video
from .several_questions import IMAGES_TASKS, VIDEO_TASKS
from .versions import Visual
from .world import WORLD_2, World, random_state


@dataclass(frozen=True)
class Course:
    """What is asked of a training prompt, and the slots that the questions lie in.

    Attributes:
        groups: for each group of slots of the same length its tasks, one per slot.
        lengths: tokens of a slot of each group.
    """

    groups: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]

    @property
    def slot_groups(self) -> tuple[tuple[int, int], ...]:
        """(slots, tokens per slot) of each group."""
        return tuple((len(tasks), length) for tasks, length in zip(self.groups, self.lengths, strict=True))

    @property
    def packed_length(self) -> int:
        """Tokens of all slots."""
        return sum(slots * length for slots, length in self.slot_groups)


@dataclass(frozen=True)
class Kind:
    """One kind of prompt.

    Attributes:
        name: of the kind.
        stream: offset of the first word of every random key within those of the world; the streams of a single picture
            are below 20 or from 101 to 119.
        video: whether the pictures are frames of one video, else images of their own.
        pictures: how many.
        world: what they look like; of one picture size.
        course: of the training.
    """

    name: str
    stream: int
    video: bool
    pictures: int
    world: World
    course: Course

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of this kind; the places in it key the random streams of the benchmark."""
        tasks = VIDEO_TASKS if self.video else IMAGES_TASKS
        return tasks if self.world.plates else tuple(task for task in tasks if task != "digits")

    @property
    def visuals(self) -> tuple[Visual, ...]:
        """The visual inputs of a prompt, in order: each image, or the video."""
        height, width = self.world.size
        if self.video:
            return (Visual(height, width, self.pictures),)
        return (Visual(height, width),) * self.pictures

    def inputs(self, pixels: Any) -> tuple[Any, ...]:
        """Pixels (prompts, pictures, ...) as those of each visual input, in order; see `visuals`."""
        return (pixels,) if self.video else tuple(pixels[:, place] for place in range(self.pictures))

    def sample(
        self,
        stream: int,
        seed: int,
        number: int,
        partner: float | None = None,
        anchors: tuple[int, int] | None = None,
    ) -> tuple[np.random.RandomState, Prompt]:
        """A prompt and the generator to render it with.

        The number decides whether two images are the same, every other one, and in turn where an object moves, so that
        the answers are balanced.

        Args:
            stream: of a training stage or a split; the streams of world and kind are added.
            seed: of the stream.
            number: of the prompt.
            partner: as for :func:`.world.sample_scene`.
            anchors: as for :func:`.world.sample_scene`; for images only.
        """
        rng = random_state(self.world.stream + self.stream + stream, seed, number)
        if self.video:
            direction = tuple(DIRECTIONS)[number % len(DIRECTIONS)]
            return rng, sample_video(rng, self.world, self.pictures, direction, partner)
        return rng, sample_images(rng, self.world, number % 2 == 0, partner, anchors)


_LONG = ("rel", "rel", "next", "digits")
_IMAGES_COURSE = Course(
    groups=(
        ("which",) * 3
        + ("exist",) * 2
        + ("loc",) * 3
        + ("cell",) * 3
        + ("changed",) * 2
        + ("same", "color", "shape", "count"),
        _LONG,
    ),
    lengths=(15, 19),
)
_VIDEO_SHORT = (
    ("still",) * 2
    + ("exist",) * 2
    + ("loc",) * 3
    + ("cell",) * 2
    + ("changed",) * 2
    + ("moved", "direction", "color", "shape", "count")
)
_VIDEO_COURSE = Course((_VIDEO_SHORT, _LONG), lengths=(16, 18))
_LONG_VIDEO_COURSE = Course((_VIDEO_SHORT, _LONG[:-1]), lengths=(16, 18))
_SMALL = replace(WORLD_2, plates=(), radii=((5, 5), (6, 7)), spill=2, clutter=4).sized((64, 64))
"""World 2 in pictures that are too small for plates."""

IMAGES = Kind("images", 20, False, 2, WORLD_2, _IMAGES_COURSE)
VIDEO = Kind("video", 40, True, 4, WORLD_2, _VIDEO_COURSE)
LONG_VIDEO = Kind("long-video", 60, True, 8, _SMALL, _LONG_VIDEO_COURSE)
KINDS = {kind.name: kind for kind in (IMAGES, VIDEO, LONG_VIDEO)}
