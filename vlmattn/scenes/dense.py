"""Targets of the vision pre-training: what every visual token of a picture shows and where it is.

Without the row and column targets the tower learns content only, and the decoder needs many times longer to answer
questions about places.
"""

from __future__ import annotations

import numpy as np

from .packing import IGNORE, PRETRAINING_STREAM
from .render import Box, render
from .versions import Version, Visual
from .world import COLOR_NAMES, SHAPE_NAMES, Plate, random_state, sample_scene

PLATE_COLOR, BACKGROUND_COLOR = len(COLOR_NAMES), len(COLOR_NAMES) + 1
BACKGROUND_SHAPE = len(SHAPE_NAMES)
PLACES = ("row", "column")
"""Targets that say where a token is, not what it shows."""
_MARGIN = 3
_CLEAR_OPACITY = 0.3


def target_classes(version: Version) -> dict[str, int]:
    """Name and number of classes of each target of a token: colour and shape first, then size, digits, row, column."""
    digits = {f"digit_{place}": 10 for place in range(version.world.digits)}
    _, *sides = zip(*(version.grid(Visual(*size)) for size in version.world.sizes), strict=True)
    places = dict(zip(PLACES, map(max, sides), strict=True))
    return {"color": BACKGROUND_COLOR + 1, "shape": BACKGROUND_SHAPE + 1, "size": 2} | digits | places


def token_targets(boxes: list[Box], version: Version, size: tuple[int, int]) -> np.ndarray:
    """Class of every token for every target, (targets, rows, columns) int64; IGNORE where it is undefined.

    A token belongs to a box that contains its centre, give or take three pixels. Under objects of an opacity up to 0.3
    colour and shape are ignored: too little can be seen there to demand an answer from single tokens.

    Args:
        boxes: what was drawn where.
        version: its targets and its tokens.
        size: height and width of the picture.
    """
    _, rows, columns = version.grid(Visual(*size))
    y, x = ((np.arange(count) + 0.5) * whole / count for count, whole in zip((rows, columns), size, strict=True))
    targets = np.full((len(target_classes(version)), rows, columns), IGNORE, dtype=np.int64)
    color, shape, large, *digits, row, column = targets
    color[:], shape[:] = BACKGROUND_COLOR, BACKGROUND_SHAPE
    row[:] = np.arange(rows)[:, None]
    column[:] = np.arange(columns)[None, :]
    for box in boxes:
        across = (x > box.left - _MARGIN) & (x < box.left + box.width + _MARGIN)
        down = (y > box.top - _MARGIN) & (y < box.top + box.height + _MARGIN)
        place = down[:, None] & across[None, :]
        item = box.item
        if isinstance(item, Plate):
            color[place], shape[place] = PLATE_COLOR, BACKGROUND_SHAPE
            large[place] = IGNORE
            for target, digit in zip(digits, item.digits, strict=True):
                target[place] = digit
        elif item.opacity > _CLEAR_OPACITY:
            color[place] = COLOR_NAMES.index(item.color)
            shape[place] = SHAPE_NAMES.index(item.shape)
            large[place] = int(item.large)
        else:
            color[place] = shape[place] = IGNORE
    return targets


def pretraining_batch(
    version: Version, seed: int, first: int, count: int, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples number ``first`` to ``first + count - 1`` of a seed's stream.

    Args:
        version: its world and its targets.
        seed: the training seed.
        first: number of the first sample.
        count: batch size.
        size: height and width of the pictures; None for the world's (first) size.

    Returns:
        Pixels (count, H, W, 3) uint8 and targets (targets, count, tokens) int64.
    """
    world = version.world.sized(size or version.world.size)
    pixels, targets = [], []
    for number in range(first, first + count):
        rng = random_state(world.stream + PRETRAINING_STREAM, seed, number)
        image, boxes = render(rng, sample_scene(rng, world))
        pixels.append(image)
        targets.append(token_targets(boxes, version, world.size))
    return np.stack(pixels), np.stack(targets, axis=1).reshape(len(targets[0]), count, -1)
