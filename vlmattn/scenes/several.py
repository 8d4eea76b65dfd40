"""Prompts with several pictures: two images of nearly the same scene, and short videos in which one object moves.

Both have two scenes that a question can be about: those of the first and of the second image, or those of the first and
of the last frame. As in world.py everything is a pure function of integer seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from .render import NOISE, Box, render, shape_mask
from .text import NUMBER_NAMES
from .world import COLOR_NAMES, COLORS, NUM_TYPES, Plate, Scene, SceneObject, World, sample_scene, type_index

CHANGES = ("replaced", "recolored", "moved", "removed")
"""What can be different in one of two images: one object is of another type, of another colour alone, in another cell,
or missing."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns of a step in each direction."""
VIDEO_OBJECTS, VIDEO_ANCHORS = (3, 6), (2, 3)
"""Fewest and most objects of a video, and the anchors that bring them."""
FLICKER = 4.0
"""Standard deviation of the luminance noise that is new in each frame, in grey levels."""


@dataclass(frozen=True)
class Images:
    """Two images, the same or different in one object; background, noise, clutter and jitter always differ.

    Attributes:
        scenes: of the first and of the second image.
        change: a name in CHANGES, or ``""`` where the scenes are the same.
    """

    scenes: tuple[Scene, Scene]
    change: str

    @property
    def views(self) -> tuple[str, str]:
        """What questions call the two scenes."""
        return "the first image", "the second image"

    def render(self, rng: np.random.RandomState) -> tuple[np.ndarray, list[list[Box]]]:
        """Draw both images.

        Args:
            rng: the source of jitter, background and noise; it is advanced.

        Returns:
            Pixels, (2, height, width, 3) uint8 RGB, and for each image the boxes as :func:`.render.render` gives them.
        """
        pixels, boxes = zip(*(render(rng, scene) for scene in self.scenes), strict=True)
        return np.stack(pixels), list(boxes)


@dataclass(frozen=True)
class Video:
    """A scene in which one object moves in a straight line at a steady speed over empty cells; all else stays.

    Attributes:
        scene: at the first frame.
        mover: index of the object that moves.
        direction: a name in DIRECTIONS.
        distance: cells that it moves from the first to the last frame.
        frames: number of frames, at least 2.
    """

    scene: Scene
    mover: int
    direction: str
    distance: int
    frames: int

    @property
    def scenes(self) -> tuple[Scene, Scene]:
        """At the first and at the last frame."""
        item = self.scene.objects[self.mover]
        *_, end = _path(self.scene.world, item.cell, self.direction, self.distance)
        return self.scene, _with_object(self.scene, self.mover, replace(item, cell=end))

    @property
    def views(self) -> tuple[str, str]:
        """What questions call the two scenes."""
        return f"frame {NUMBER_NAMES[1]}", f"frame {NUMBER_NAMES[self.frames]}"

    def render(self, rng: np.random.RandomState) -> tuple[np.ndarray, list[list[Box]]]:
        """Draw all frames.

        The background and the objects that stay are drawn once; each frame adds a weak flicker. The object that moves
        has the same grain as its surroundings, so that no single frame gives it away; plates cover it as everywhere.

        Args:
            rng: the source of jitter, background and noise; it is advanced.

        Returns:
            Pixels, (frames, height, width, 3) uint8 RGB, and for each frame one box per object in the scene's order,
            the plates' last.
        """
        item = self.scene.objects[self.mover]
        still, others = render(rng, _without_object(self.scene, self.mover))
        radius = int(self.scene.world.radii[item.large][rng.randint(2)])
        mask = shape_mask(item.shape, radius)[..., None]
        ink = np.array(COLORS[item.color]) * rng.uniform(0.8, 1.0) + rng.normal(0.0, 10.0, 3)
        ink = ink + rng.normal(0.0, NOISE, mask.shape)
        pixels, boxes = [], []
        for top, left in self._corners(rng, len(mask)):
            canvas = still.astype(np.float64)
            patch = canvas[top : top + len(mask), left : left + len(mask)]
            patch += item.opacity * mask * (ink - patch)
            for plate in (box for box in others if isinstance(box.item, Plate)):
                place = np.s_[plate.top : plate.top + plate.height, plate.left : plate.left + plate.width]
                canvas[place] = still[place]
            canvas += rng.normal(0.0, FLICKER, (*still.shape[:2], 1))
            pixels.append(np.clip(canvas, 0, 255).astype(np.uint8))
            boxes.append([*others[: self.mover], Box(left, top, len(mask), len(mask), item), *others[self.mover :]])
        return np.stack(pixels), boxes

    def _corners(self, rng: np.random.RandomState, side: int) -> list[tuple[int, int]]:
        """Top and left of the moving object in each frame, in pixels; ``side`` is its height and width."""
        world = self.scene.world
        places = [world.place(scene.objects[self.mover].cell) for scene in self.scenes]
        tracks = []
        for first, last, cell, whole in zip(*places, world.cell_size, world.size, strict=True):
            jitter = int(rng.randint(-world.spill, cell - side + world.spill + 1))
            jitter = min(max(jitter, -min(first, last) * cell), whole - side - max(first, last) * cell)
            way = (last - first) * cell / (self.frames - 1)
            tracks.append([round(first * cell + jitter + step * way) for step in range(self.frames)])
        return list(zip(*tracks, strict=True))


Prompt: TypeAlias = Images | Video
"""Pictures that one prompt shows, with `scenes`, `views` and `render`."""


def _with_object(scene: Scene, index: int, item: SceneObject) -> Scene:
    return replace(scene, objects=(*scene.objects[:index], item, *scene.objects[index + 1 :]))


def _without_object(scene: Scene, index: int) -> Scene:
    return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def _path(world: World, cell: int, direction: str, distance: int) -> list[int]:
    """Cells that an object in ``cell`` enters on its way; empty where the way leaves the picture."""
    (row, column), (down, right) = world.place(cell), DIRECTIONS[direction]
    if not 0 <= row + down * distance < world.grid or not 0 <= column + right * distance < world.grid:
        return []
    return [cell + step * (down * world.grid + right) for step in range(1, distance + 1)]


def _changed(rng: np.random.RandomState, scene: Scene, index: int, change: str) -> Scene:
    """The scene with a change of one object; see CHANGES."""
    item = scene.objects[index]
    if change == "removed":
        return _without_object(scene, index)
    if change == "moved":
        free = scene.empty_cells()
        return _with_object(scene, index, replace(item, cell=free[rng.randint(len(free))]))
    kinds = [type_index(color, item.shape) for color in COLOR_NAMES] if change == "recolored" else range(NUM_TYPES)
    kinds = [kind for kind in kinds if kind not in scene.types]
    return _with_object(scene, index, replace(item, type=kinds[rng.randint(len(kinds))]))


def sample_images(
    rng: np.random.RandomState,
    world: World,
    same: bool,
    partner: float | None = None,
    anchors: tuple[int, int] | None = None,
) -> Images:
    """Draw two images.

    Args:
        rng: the source of randomness; it is advanced.
        world: what scenes look like.
        same: whether both show the same objects. Otherwise one that is fully opaque is different, in the first or in
            the second image; no image is empty.
        partner: as for :func:`.world.sample_scene`.
        anchors: as for :func:`.world.sample_scene`.
    """
    while True:
        scene = sample_scene(rng, world, partner, anchors)
        opaque = [index for index, item in enumerate(scene.objects) if item.opacity == 1]
        if opaque:
            break
    if same:
        return Images((scene, scene), "")
    possible = [change for change in CHANGES if change != "removed" or len(scene.objects) > 1]
    change = possible[rng.randint(len(possible))]
    other = _changed(rng, scene, opaque[rng.randint(len(opaque))], change)
    return Images((scene, other) if rng.randint(2) else (other, scene), change)


def _moves(scene: Scene, direction: str) -> Iterator[tuple[int, int]]:
    """Objects, by index, that can move in a direction, with each distance that they can move over empty cells."""
    empty = set(scene.empty_cells())
    for index, item in enumerate(scene.objects):
        for distance in range(1, scene.world.grid):
            path = _path(scene.world, item.cell, direction, distance)
            if path and empty.issuperset(path):
                yield index, distance


def sample_video(
    rng: np.random.RandomState, world: World, frames: int, direction: str, partner: float | None = None
) -> Video:
    """Draw a video of three to six objects; the one that moves is opaque.

    Args:
        rng: the source of randomness; it is advanced.
        world: what scenes look like.
        frames: number of frames.
        direction: where the object moves, a name in DIRECTIONS.
        partner: as for :func:`.world.sample_scene`.
    """
    fewest, most = VIDEO_OBJECTS
    while True:
        scene = sample_scene(rng, world, partner, VIDEO_ANCHORS)
        moves = list(_moves(scene, direction))
        if fewest <= len(scene.objects) <= most and moves:
            break
    index, distance = moves[rng.randint(len(moves))]
    scene = _with_object(scene, index, replace(scene.objects[index], opacity=1.0))
    return Video(scene, index, direction, distance, frames)
