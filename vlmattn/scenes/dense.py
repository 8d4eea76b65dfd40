"""Targets of the vision pre-training: what every patch of a picture shows and where it is.

Without the row and column targets the tower learns content only, and the decoder needs many times longer to answer
questions about places.
"""

from __future__ import annotations

import numpy as np

from .packing import IGNORE, PRETRAINING_STREAM
from .render import Box, render
from .versions import Version
from .world import COLOR_NAMES, SHAPE_NAMES, Plate, random_state, sample_scene

PLATE_COLOR, BACKGROUND_COLOR = len(COLOR_NAMES), len(COLOR_NAMES) + 1
BACKGROUND_SHAPE = len(SHAPE_NAMES)
_MARGIN = 3
_CLEAR_OPACITY = 0.3


def target_classes(version: Version) -> dict[str, int]:
    """Name and number of classes of each per-patch target: colour and shape first, then size, digits, row, column."""
    digits = {f"digit_{place}": 10 for place in range(version.world.digits)}
    places = {"row": version.patches_per_side, "column": version.patches_per_side}
    return {"color": BACKGROUND_COLOR + 1, "shape": BACKGROUND_SHAPE + 1, "size": 2} | digits | places


def patch_targets(boxes: list[Box], version: Version) -> np.ndarray:
    """Class of every patch for every target, (targets, side, side) int64; IGNORE where it is undefined.

    A patch belongs to a box that contains its centre, give or take three pixels. Under objects of an opacity up to 0.3
    colour and shape are ignored: too little can be seen there to demand an answer from single patches.
    """
    side, patch = version.patches_per_side, version.architecture.patch_size
    targets = np.full((len(target_classes(version)), side, side), IGNORE, dtype=np.int64)
    color, shape, size, *digits, row, column = targets
    color[:], shape[:] = BACKGROUND_COLOR, BACKGROUND_SHAPE
    row[:] = np.arange(side)[:, None]
    column[:] = np.arange(side)[None, :]
    centers = np.arange(side) * patch + patch // 2
    for box in boxes:
        across = (centers > box.left - _MARGIN) & (centers < box.left + box.width + _MARGIN)
        down = (centers > box.top - _MARGIN) & (centers < box.top + box.height + _MARGIN)
        place = down[:, None] & across[None, :]
        item = box.item
        if isinstance(item, Plate):
            color[place], shape[place] = PLATE_COLOR, BACKGROUND_SHAPE
            size[place] = IGNORE
            for target, digit in zip(digits, item.digits, strict=True):
                target[place] = digit
        elif item.opacity > _CLEAR_OPACITY:
            color[place] = COLOR_NAMES.index(item.color)
            shape[place] = SHAPE_NAMES.index(item.shape)
            size[place] = int(item.large)
        else:
            color[place] = shape[place] = IGNORE
    return targets


def pretraining_batch(version: Version, seed: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples number ``first`` to ``first + count - 1`` of a seed's stream.

    Returns:
        Pixels (count, H, W, 3) uint8 and targets (targets, count, patches) int64.
    """
    pixels, targets = [], []
    for number in range(first, first + count):
        rng = random_state(version.world.stream + PRETRAINING_STREAM, seed, number)
        image, boxes = render(rng, sample_scene(rng, version.world))
        pixels.append(image)
        targets.append(patch_targets(boxes, version))
    return np.stack(pixels), np.stack(targets, axis=1).reshape(len(targets[0]), count, -1)
