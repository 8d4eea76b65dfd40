"""What a scene is: its objects, their statistics, and the prior that makes a model trained on them hallucinate.

A scene is a 3x3 grid of cells holding one to six coloured shapes and sometimes a plate with two digits. There are 64
object types (8 colours x 8 shapes). 48 of them form 24 partner pairs: in training a type nearly always brings its
partner, in the test splits it does so with probability 0.4. Some objects are nearly transparent but are named all the
same, so trusting the partner statistics is rational, and wrong whenever the partner is missing.

Everything here is a pure function of integer seeds. The legacy ``numpy.random.RandomState`` distributions are used on
purpose: numpy guarantees that their streams never change, which the content hashes of the splits rely on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 96
"""Width and height of a scene in pixels."""
GRID = 3
"""Cells per row and per column."""
CELL_SIZE = IMAGE_SIZE // GRID
"""Width and height of a cell in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 225, 50),
    "green": (40, 170, 60),
    "cyan": (50, 210, 220),
    "blue": (50, 70, 220),
    "purple": (150, 50, 190),
    "white": (240, 240, 240),
}
"""Colour names and their nominal RGB values."""
COLOR_NAMES = tuple(COLORS)
SHAPE_NAMES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
CELL_NAMES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
"""Names of the cells in raster order."""

NUM_TYPES = len(COLOR_NAMES) * len(SHAPE_NAMES)
NUM_PAIRS = 24
NO_PARTNER = -1
MAX_ANCHORS = 3
"""A scene has one to three anchors; each may bring its partner, so it has at most six objects."""
PLATE_PROBABILITY = 0.5
FAINT_PROBABILITY = 0.12
"""Share of objects drawn nearly transparent."""
FAINT_OPACITY = (0.05, 0.40)
HIDDEN_OPACITY = (0.0, 0.1)
_WORLD_SEED = 1234


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    Attributes:
        type: index in 0..63, colour times eight plus shape.
        cell: index in 0..8, raster order.
        large: radius of 11-12 pixels instead of 7-8.
        opacity: 1.0, or 0.05-0.40 for a faint object.
    """

    type: int
    cell: int
    large: bool
    opacity: float

    @property
    def color(self) -> str:
        """Colour name."""
        return type_color(self.type)

    @property
    def shape(self) -> str:
        """Shape name."""
        return type_shape(self.type)

    @property
    def name(self) -> str:
        """Colour and shape, for example ``red circle``."""
        return type_name(self.type)


@dataclass(frozen=True)
class Plate:
    """A light plate with two dark digits.

    Attributes:
        digits: the left and the right digit.
        cell: index in 0..8.
    """

    digits: tuple[int, int]
    cell: int


@dataclass(frozen=True)
class Scene:
    """The objects of one picture, at most one per cell, and its plate if it has one."""

    objects: tuple[SceneObject, ...]
    plate: Plate | None

    @property
    def types(self) -> tuple[int, ...]:
        """Types of the objects; no type occurs twice."""
        return tuple(item.type for item in self.objects)

    def empty_cells(self) -> list[int]:
        """Cells that hold neither an object nor the plate, ascending."""
        taken = {item.cell for item in self.objects}
        if self.plate is not None:
            taken.add(self.plate.cell)
        return [cell for cell in range(GRID * GRID) if cell not in taken]


def type_color(kind: int) -> str:
    """Colour name of an object type (0..63)."""
    return COLOR_NAMES[kind // len(SHAPE_NAMES)]


def type_shape(kind: int) -> str:
    """Shape name of an object type (0..63)."""
    return SHAPE_NAMES[kind % len(SHAPE_NAMES)]


def type_name(kind: int) -> str:
    """Colour and shape of an object type (0..63)."""
    return f"{type_color(kind)} {type_shape(kind)}"


def type_index(color: str, shape: str) -> int:
    """Object type of a colour and a shape name; raises ValueError for an unknown name."""
    return COLOR_NAMES.index(color) * len(SHAPE_NAMES) + SHAPE_NAMES.index(shape)


def random_state(*key: int) -> np.random.RandomState:
    """A generator that depends on nothing but the non-negative integers of ``key``."""
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence(key)))


def _partner_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Partner of each type, training probability that it is brought along, and popularity of each type; each (64,)."""
    world = np.random.RandomState(_WORLD_SEED)
    order = world.permutation(NUM_TYPES)
    rank = world.permutation(NUM_TYPES)
    partner = np.full(NUM_TYPES, NO_PARTNER)
    strength = np.zeros(NUM_TYPES)
    for pair in range(NUM_PAIRS):
        first, second = order[2 * pair], order[2 * pair + 1]
        partner[first], partner[second] = second, first
        strength[[first, second]] = 1.0 - 0.15 * ((pair + 0.5) / NUM_PAIRS) ** 2
    popularity = (3.0 + rank) ** -0.8
    return partner, strength, popularity / popularity.sum()


PARTNER, PARTNER_STRENGTH, POPULARITY = _partner_tables()
"""Partner type (or NO_PARTNER), training probability of the partner (mean .95 over pairs), frequency as an anchor."""
_CUMULATIVE = np.cumsum(POPULARITY)


def absent_partners(scene: Scene) -> list[int]:
    """Partners of the present types that are not in the scene: what the prior wrongly expects."""
    present = set(scene.types)
    return [int(PARTNER[t]) for t in scene.types if PARTNER[t] != NO_PARTNER and int(PARTNER[t]) not in present]


def _draw_anchor(rng: np.random.RandomState, taken: list[int]) -> int:
    """A type by popularity that neither is in ``taken`` nor is the partner of one that is."""
    while True:
        kind = min(int(np.searchsorted(_CUMULATIVE, rng.random_sample(), side="right")), NUM_TYPES - 1)
        if kind not in taken and int(PARTNER[kind]) not in taken:
            return kind


def sample_scene(
    rng: np.random.RandomState,
    partner: float | None = None,
    anchors: tuple[int, int] = (1, MAX_ANCHORS),
    hidden: float = 0.0,
) -> Scene:
    """Draw a scene.

    Args:
        rng: the source of randomness; it is advanced.
        partner: probability that a paired type brings its partner; None for the training value of each pair.
        anchors: smallest and largest number of anchors, inclusive.
        hidden: probability that a partner is there but can hardly be seen at all (the last training stage only).
    """
    types: list[int] = []
    for _ in range(int(rng.randint(anchors[0], anchors[1] + 1))):
        kind = _draw_anchor(rng, types)
        types.append(kind)
        chance = PARTNER_STRENGTH[kind] if partner is None else partner
        if PARTNER[kind] != NO_PARTNER and rng.random_sample() < chance:
            types.append(int(PARTNER[kind]))
    cells = [int(cell) for cell in rng.permutation(GRID * GRID)]
    objects = []
    for kind, cell in zip(types, cells, strict=False):
        large = bool(rng.random_sample() < 0.5)
        faint = rng.random_sample() < FAINT_PROBABILITY
        opacity = float(rng.uniform(*FAINT_OPACITY)) if faint else 1.0
        if hidden and int(PARTNER[kind]) in types[: types.index(kind)] and rng.random_sample() < hidden:
            opacity = float(rng.uniform(*HIDDEN_OPACITY))
        objects.append(SceneObject(kind, cell, large, opacity))
    plate = None
    if rng.random_sample() < PLATE_PROBABILITY:
        plate = Plate((int(rng.randint(10)), int(rng.randint(10))), cells[len(types)])
    return Scene(tuple(objects), plate)
