"""From a scene to pixels: shape masks, a bitmap font for digits, a textured background and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .world import COLORS, Plate, Scene, SceneObject, World

NOISE = 10.0
"""Standard deviation of the luminance noise, in grey levels."""
_PLATE_GREY, _INK_GREY = 225, 20
_CLUTTER_GREY = (40, 150)
_BAR_LENGTH, _BAR_WIDTH = (4, 13), (1, 4)
_SUPERSAMPLING = 4
_GLYPH_ROWS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    "##### ...#. ..#.. ...#. ....# #...# .###.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. .#... .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)


@dataclass(frozen=True)
class Box:
    """Where something was drawn: left, top, width and height in pixels, and what it is."""

    left: int
    top: int
    width: int
    height: int
    item: SceneObject | Plate


def _inside_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Even-odd test of points against a polygon given as (n, 2) corners."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _star_corners() -> np.ndarray:
    """Ten corners of a five-pointed star with one point up, in units of the radius."""
    angle = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack((reach * np.sin(angle), -reach * np.cos(angle)), axis=1)


def _shape_region(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points belong to a shape; coordinates in units of the radius, y downwards."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1.0
    if shape == "ring":
        return (radius <= 1.0) & (radius >= 0.5)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.86
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.0
    if shape == "cross":
        thin, long = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return (thin <= 0.33) & (long <= 0.95)
    if shape == "triangle":
        return _inside_polygon(x, y, np.array([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]))
    if shape == "star":
        return _inside_polygon(x, y, _star_corners())
    if shape == "heart":
        lobes = np.hypot(np.abs(x) - 0.46, y + 0.36) <= 0.50
        return lobes | _inside_polygon(x, y, np.array([(-0.90, -0.14), (0.0, -0.40), (0.90, -0.14), (0.0, 0.92)]))
    raise ValueError(f"shape={shape!r} is not one of the world's shapes")


@cache
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """Anti-aliased coverage of a shape, (2 radius + 2, 2 radius + 2) float64 in 0..1."""
    side = 2 * radius + 2
    steps = (np.arange(side * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - side / 2
    y, x = np.meshgrid(steps / radius, steps / radius, indexing="ij")
    region = _shape_region(shape, x, y).reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING)
    return region.mean(axis=(1, 3))


@cache
def _glyph(digit: int, dot: tuple[int, int]) -> np.ndarray:
    """Ink of a digit, bool: the 5x7 bitmap with dots of the given width and height."""
    small = np.array([[mark == "#" for mark in row] for row in _GLYPH_ROWS[digit].split()])
    return small.repeat(dot[1], axis=0).repeat(dot[0], axis=1)


def plate_size(world: World) -> tuple[int, int]:
    """Width and height of a plate in pixels: its digits with a pixel around each."""
    width, height = world.glyph
    return world.digits * (5 * width + 1) + 1, 7 * height + 2


def _between_knots(count: int, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """For ``count`` pixels in a row over ``knots`` grid points: the point before each, and the way to the next."""
    place = np.linspace(0.0, knots - 1.0, count)
    low = np.minimum(place.astype(int), knots - 2)
    return low, place - low


def _background(rng: np.random.RandomState, size: tuple[int, int]) -> np.ndarray:
    """A smooth random colour field, (height, width, 3) float64: a coarse random grid, bilinearly enlarged."""
    base = rng.uniform(50, 120, 3)
    knots = int(rng.randint(2, 7))
    coarse = rng.normal(0.0, 1.0, (knots, knots, 3))
    contrast = rng.uniform(5, 22)
    low, part = _between_knots(size[0], knots)
    rows = coarse[low] * (1 - part)[:, None, None] + coarse[low + 1] * part[:, None, None]
    low, part = _between_knots(size[1], knots)
    field = rows[:, low] * (1 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]
    return base + contrast * field


def _draw_clutter(rng: np.random.RandomState, canvas: np.ndarray, most: int) -> None:
    """Paint up to ``most`` upright or lying grey bars anywhere."""
    for _ in range(int(rng.randint(most + 1))):
        sides = [int(rng.randint(*_BAR_LENGTH)), int(rng.randint(*_BAR_WIDTH))]
        height, width = sides if rng.randint(2) else sides[::-1]
        top, left = (
            int(rng.randint(0, whole - side + 1)) for whole, side in zip(canvas.shape, (height, width), strict=False)
        )
        canvas[top : top + height, left : left + width] = rng.uniform(*_CLUTTER_GREY)


def _corner(rng: np.random.RandomState, world: World, cell: int, size: tuple[int, int], spill: int) -> tuple[int, int]:
    """A jittered place for something of a height and a width in a cell: top and left in pixels."""
    corner = []
    for start, extent, side, whole in zip(world.place(cell), size, world.cell_size, world.size, strict=True):
        jitter = int(rng.randint(-spill, side - extent + spill + 1))
        corner.append(min(max(start * side + jitter, 0), whole - extent))
    return corner[0], corner[1]


def _draw_object(rng: np.random.RandomState, canvas: np.ndarray, item: SceneObject, world: World) -> Box:
    """Blend an object into the canvas at a jittered place in its cell."""
    mask = shape_mask(item.shape, int(world.radii[item.large][rng.randint(2)]))
    side = len(mask)
    top, left = _corner(rng, world, item.cell, (side, side), world.spill)
    color = np.array(COLORS[item.color]) * rng.uniform(0.8, 1.0) + rng.normal(0.0, 10.0, 3)
    patch = canvas[top : top + side, left : left + side]
    patch += item.opacity * mask[..., None] * (color - patch)
    return Box(left, top, side, side, item)


def _draw_plate(rng: np.random.RandomState, canvas: np.ndarray, plate: Plate, world: World) -> Box:
    """Paint a plate and its digits at a jittered place inside the cell."""
    width, height = plate_size(world)
    top, left = _corner(rng, world, plate.cell, (height, width), 0)
    canvas[top : top + height, left : left + width] = _PLATE_GREY
    for place, digit in enumerate(plate.digits):
        ink = _glyph(digit, world.glyph)
        x = left + 1 + place * (5 * world.glyph[0] + 1)
        canvas[top + 1 : top + 1 + ink.shape[0], x : x + ink.shape[1]][ink] = _INK_GREY
    return Box(left, top, width, height, plate)


def render(rng: np.random.RandomState, scene: Scene) -> tuple[np.ndarray, list[Box]]:
    """Draw a scene.

    Args:
        rng: the source of jitter, background and noise; it is advanced.
        scene: what to draw.

    Returns:
        Pixels, (height, width, 3) uint8 RGB, and one box per object in the scene's order, the plates' last: what comes
        later covers what comes before.
    """
    world = scene.world
    canvas = _background(rng, world.size)
    _draw_clutter(rng, canvas, world.clutter)
    boxes = [_draw_object(rng, canvas, item, world) for item in scene.objects]
    boxes += [_draw_plate(rng, canvas, plate, world) for plate in scene.plates]
    canvas += rng.normal(0.0, NOISE, (*world.size, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes
