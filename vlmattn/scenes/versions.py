"""The versions of the embedded model: what its scenes look like, how it is built, and what it is taught.

A version is frozen once a checkpoint of it is shipped; a change is a new version.
"""

from __future__ import annotations

from dataclasses import dataclass

from .text import BOS_ID, IMAGE_ID, USER_ID, VOCABULARY_SIZES
from .world import WORLD_1, WORLD_2, World


@dataclass(frozen=True)
class Architecture:
    """Sizes of a LLaVA: a CLIP tower with a class token and a Llama decoder.

    Attributes:
        hidden: width of tower and decoder.
        decoder_layers: number of Llama layers.
        vision_layers: number of CLIP layers.
        heads: attention heads of both.
        kv_heads: key and value heads of the decoder.
        mlp: inner width of the decoder's feed-forward layers.
        patch_size: width and height of a patch in pixels.
        vocabulary: number of token ids.
        tap: decoder layer whose output the auxiliary place loss reads.
    """

    hidden: int = 128
    decoder_layers: int = 6
    vision_layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 384
    patch_size: int = 8
    vocabulary: int = VOCABULARY_SIZES[0]
    tap: int = 3


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

    @property
    def patches_per_side(self) -> int:
        """Patches in a row and in a column of a picture."""
        return self.world.image_size // self.architecture.patch_size

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture; the class token is dropped."""
        return self.patches_per_side**2

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids in front of every question."""
        return (BOS_ID, USER_ID) + (IMAGE_ID,) * self.visual_tokens


VERSION_1 = Version(
    name="1",
    world=WORLD_1,
    architecture=Architecture(),
    lessons=Lessons(
        short=("loc",) * 3 + ("cell",) * 5 + ("exist-yes",) * 2 + ("color", "shape"),
        negatives=2,
        digits=1,
        relations=("rel",) * 3,
        lengths=(12, 16, 30),
    ),
)
VERSION_2 = Version(
    name="2",
    world=WORLD_2,
    architecture=Architecture(decoder_layers=12, kv_heads=2, mlp=256, vocabulary=VOCABULARY_SIZES[1], tap=5),
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
VERSIONS = {version.name: version for version in (VERSION_1, VERSION_2)}
