"""What a scene is: its objects, their statistics, and the prior that makes a model trained on them hallucinate.

A scene is a grid of cells holding coloured shapes and sometimes plates with digits; a :class:`World` says how many and
how large. There are 64 object types (8 colours x 8 shapes). 48 of them form 24 partner pairs: in training a type nearly
always brings its partner, in the test splits it does so with probability 0.4. Some objects are nearly transparent but
are named all the same, so trusting the partner statistics is rational, and wrong whenever the partner is missing. Types
and pairs are the same in all worlds.

Everything here is a pure function of integer seeds. The legacy ``numpy.random.RandomState`` distributions are used on
purpose: numpy guarantees that their streams never change, which the content hashes of the splits rely on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

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

NUM_TYPES = len(COLOR_NAMES) * len(SHAPE_NAMES)
NUM_PAIRS = 24
NO_PARTNER = -1
FAINT_PROBABILITY = 0.12
"""Share of objects drawn nearly transparent."""
FAINT_OPACITY = (0.05, 0.40)
HIDDEN_OPACITY = (0.0, 0.1)
_WORLD_SEED = 1234


@dataclass(frozen=True)
class World:
    """What the scenes of one version look like.

    Attributes:
        name: of the version.
        stream: offset of the first word of every random key, so that no two worlds draw alike.
        cell_names: names of the cells in raster order; the grid is square.
        max_anchors: a scene has one to that many anchors; each may bring its partner.
        anchor_draws: the number of anchors is the smallest of that many even draws, so that crowded scenes are rarer.
        plates: probability of each plate.
        digits: digits on a plate.
        glyph: width and height of a digit's dots in pixels.
        radii: radii in pixels of small and of large objects.
        spill: pixels by which an object may reach over the border of its cell and cover its neighbour.
        clutter: largest number of grey bars behind the objects.
        sizes: (height, width) in pixels that a picture can have; the world of a scene has one.
    """

    name: str
    stream: int
    cell_names: tuple[str, ...]
    max_anchors: int
    plates: tuple[float, ...]
    digits: int
    glyph: tuple[int, int]
    radii: tuple[tuple[int, int], tuple[int, int]]
    anchor_draws: int
    spill: int
    clutter: int
    sizes: tuple[tuple[int, int], ...] = ((96, 96),)

    @property
    def cells(self) -> int:
        """Number of cells; also the label of a mentioned object that is not in the scene."""
        return len(self.cell_names)

    @property
    def grid(self) -> int:
        """Cells per row and per column."""
        return math.isqrt(self.cells)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels: the first of `sizes`, which is the only one in a scene's world."""
        return self.sizes[0]

    @property
    def cell_size(self) -> tuple[int, int]:
        """Height and width of a cell in pixels."""
        return self.size[0] // self.grid, self.size[1] // self.grid

    def size_at(self, step: int) -> tuple[int, int]:
        """Height and width of all pictures of a training step: the sizes in turn."""
        return self.sizes[step % len(self.sizes)]

    def sized(self, size: tuple[int, int]) -> World:
        """This world with pictures of one height and width only."""
        return replace(self, sizes=(size,))

    def place(self, cell: int) -> tuple[int, int]:
        """Row and column of a cell."""
        return cell // self.grid, cell % self.grid


WORLD_2 = World(
    name="2",
    stream=200,
    cell_names=tuple(
        f"{row} {column}"
        for row in ("top", "upper", "lower", "bottom")
        for column in ("left", "midleft", "midright", "right")
    ),
    max_anchors=6,
    anchor_draws=2,
    plates=(0.65, 0.4),
    digits=3,
    glyph=(1, 2),
    radii=((6, 7), (9, 10)),
    spill=4,
    clutter=8,
)
"""Up to twelve small objects in 4x4 cells that may cover one another, before clutter, and up to two plates."""
WORLD_QWEN = replace(WORLD_2, name="qwen", stream=400, sizes=((96, 96), (96, 128), (128, 96), (128, 128)))
"""World 2 in pictures of several sizes, for a model that takes them as they are."""
WORLDS = {world.name: world for world in (WORLD_2, WORLD_QWEN)}


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    Attributes:
        type: index in 0..63, colour times eight plus shape.
        cell: index of its cell, raster order.
        large: which of the world's two sizes it has.
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
    """A light plate with dark digits.

    Attributes:
        digits: from left to right.
        cell: index of its cell.
    """

    digits: tuple[int, ...]
    cell: int

    @property
    def text(self) -> str:
        """The digits, separated by blanks."""
        return " ".join(map(str, self.digits))


@dataclass(frozen=True)
class Scene:
    """The objects and plates of one picture, at most one of them per cell."""

    objects: tuple[SceneObject, ...]
    plates: tuple[Plate, ...]
    world: World

    @property
    def types(self) -> tuple[int, ...]:
        """Types of the objects; no type occurs twice."""
        return tuple(item.type for item in self.objects)

    def empty_cells(self) -> list[int]:
        """Cells that hold neither an object nor a plate, ascending."""
        return [cell for cell in range(self.world.cells) if self.content(cell) == "nothing"]

    def content(self, cell: int) -> str:
        """What a cell holds: the name of an object, ``digits`` or ``nothing``."""
        for item in self.objects:
            if item.cell == cell:
                return item.name
        return "digits" if any(plate.cell == cell for plate in self.plates) else "nothing"


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
    world: World = WORLD_2,
    partner: float | None = None,
    anchors: tuple[int, int] | None = None,
    hidden: float = 0.0,
) -> Scene:
    """Draw a scene.

    Args:
        rng: the source of randomness; it is advanced.
        world: what scenes look like; of several picture sizes one is drawn.
        partner: probability that a paired type brings its partner; None for the training value of each pair.
        anchors: smallest and largest number of anchors, inclusive; None for 1 and the world's largest.
        hidden: probability that a partner is there but can hardly be seen at all (the last training stage only).
    """
    if len(world.sizes) > 1:
        world = world.sized(world.sizes[int(rng.randint(len(world.sizes)))])
    types: list[int] = []
    fewest, most = anchors or (1, world.max_anchors)
    for _ in range(min(int(rng.randint(fewest, most + 1)) for _ in range(world.anchor_draws))):
        kind = _draw_anchor(rng, types)
        types.append(kind)
        chance = PARTNER_STRENGTH[kind] if partner is None else partner
        if PARTNER[kind] != NO_PARTNER and rng.random_sample() < chance:
            types.append(int(PARTNER[kind]))
    cells = [int(cell) for cell in rng.permutation(world.cells)]
    objects = []
    for kind, cell in zip(types, cells, strict=False):
        large = bool(rng.random_sample() < 0.5)
        faint = rng.random_sample() < FAINT_PROBABILITY
        opacity = float(rng.uniform(*FAINT_OPACITY)) if faint else 1.0
        if hidden and int(PARTNER[kind]) in types[: types.index(kind)] and rng.random_sample() < hidden:
            opacity = float(rng.uniform(*HIDDEN_OPACITY))
        objects.append(SceneObject(kind, cell, large, opacity))
    free = iter(cells[len(types) :])
    plates = [
        Plate(tuple(int(rng.randint(10)) for _ in range(world.digits)), next(free))
        for chance in world.plates
        if rng.random_sample() < chance
    ]
    return Scene(tuple(objects), tuple(plates), world)
