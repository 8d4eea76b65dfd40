"""The versions of the embedded model: what its scenes look like, how it is built, and what it is taught.

A version is frozen once a checkpoint of it is shipped; a change is a new version.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from .text import BOS_ID, IMAGE_ID, USER_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID
from .world import WORLD_2, WORLD_QWEN, World

LLAVA, QWEN = "llava", "qwen"
"""Families of models: a CLIP tower with a class token and a Llama decoder (llava.py), Qwen2.5-VL (qwen.py)."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model.

    Attributes:
        hidden: width of tower and decoder.
        decoder_layers: number of decoder layers.
        vision_layers: number of layers of the vision tower.
        heads: attention heads of both.
        kv_heads: key and value heads of the decoder.
        mlp: inner width of the decoder's feed-forward layers.
        patch_size: width and height of a patch in pixels.
        merge: patches per row and column of a visual token.
        tap: decoder layer whose output the auxiliary place loss reads.
    """

    hidden: int = 128
    decoder_layers: int = 12
    vision_layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    patch_size: int = 8
    merge: int = 1
    tap: int = 5


class Visual(NamedTuple):
    """A visual input of a prompt: an image, or a video of that many frames.

    Attributes:
        height: in pixels.
        width: in pixels.
        frames: of a video, an even number; 0 for an image.
    """

    height: int
    width: int
    frames: int = 0


@dataclass(frozen=True)
class Lessons:
    """What is asked of a training picture, and the slots that the questions lie in.

    Attributes:
        short: tasks asked in short slots; position questions are many because they are learned last.
        negatives: existence questions whose answer is no, behind them.
        digits: questions about digits, behind those; where there are none, mostly about counts.
        relations: tasks asked in the slots for two objects.
        lengths: tokens of a short slot, of one for two objects and of the caption's only slot; captions get one slot
            because they crowd out the rest.
    """

    short: tuple[str, ...]
    negatives: int
    digits: int
    relations: tuple[str, ...]
    lengths: tuple[int, int, int]

    @property
    def slot_groups(self) -> tuple[tuple[int, int], ...]:
        """(slots, tokens per slot): short questions, those about two objects, the caption."""
        slots = (len(self.short) + self.negatives + self.digits, len(self.relations), 1)
        return tuple(zip(slots, self.lengths, strict=True))

    @property
    def packed_length(self) -> int:
        """Tokens of all slots."""
        return sum(slots * length for slots, length in self.slot_groups)


@dataclass(frozen=True)
class Version:
    """One version of the embedded model; see the module's docstring."""

    name: str
    world: World
    architecture: Architecture
    lessons: Lessons
    family: str = LLAVA

    @property
    def videos(self) -> bool:
        """Whether a prompt can hold videos."""
        return self.family == QWEN

    def grid(self, visual: Visual) -> tuple[int, int, int]:
        """Visual tokens of an input along time, rows and columns; two frames of a video share their tokens.

        Raises:
            ValueError: the input cannot be divided into whole tokens.
        """
        side = self.architecture.patch_size * self.architecture.merge
        if visual.height % side or visual.width % side or visual.frames % 2:
            raise ValueError(f"{visual} cannot be divided into tokens of {side}x{side} pixels and pairs of frames")
        return max(1, visual.frames // 2), visual.height // side, visual.width // side

    @property
    def picture(self) -> Visual:
        """The visual input of an ordinary prompt: one picture of the world's (first) size."""
        return Visual(*self.world.size)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of that picture."""
        _, rows, columns = self.grid(self.picture)
        return rows * columns

    def texts(self, visuals: int) -> tuple[tuple[int, ...], ...]:
        """Token ids before, between and behind that many visual inputs, in front of every question."""
        before, behind = ((VISION_START_ID,), (VISION_END_ID,)) if self.family == QWEN else ((), ())
        return (BOS_ID, USER_ID, *before), *((*behind, *before),) * (visuals - 1), behind

    def prefix(self, *visuals: Visual) -> tuple[int, ...]:
        """Token ids in front of every question about some visual inputs; none given: about the ordinary picture."""
        inputs = visuals or (self.picture,)
        first, *others = self.texts(len(inputs))
        counts = [rows * columns * time for time, rows, columns in map(self.grid, inputs)]
        places = [(VIDEO_ID if v.frames else IMAGE_ID,) * n for v, n in zip(inputs, counts, strict=True)]
        return first + tuple(chain.from_iterable(a + b for a, b in zip(places, others, strict=True)))


VERSION_2 = Version(
    name="2",
    world=WORLD_2,
    architecture=Architecture(),
    lessons=Lessons(
        short=("loc",) * 3
        + ("cell",) * 4
        + ("next",) * 2
        + ("exist-yes",) * 2
        + ("color", "shape", "pair-color", "pair-place"),
        negatives=2,
        digits=2,
        relations=("rel", "rel", "pair-rel"),
        lengths=(13, 16, 54),
    ),
)
VERSION_QWEN = Version(
    name="qwen",
    family=QWEN,
    world=WORLD_QWEN,
    architecture=Architecture(patch_size=4, merge=2),
    lessons=VERSION_2.lessons,
)
VERSIONS = {version.name: version for version in (VERSION_2, VERSION_QWEN)}
