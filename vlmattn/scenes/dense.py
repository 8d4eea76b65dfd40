"""Targets of the vision pre-training: what every patch of a picture shows and where it is.

Without the row and column targets the tower learns content only, and the decoder needs many times longer to answer
questions about places.
"""

from __future__ import annotations

import numpy as np

from .packing import IGNORE, PATCH_SIZE, PATCHES_PER_SIDE, PRETRAINING_STREAM
from .render import Box, render
from .world import COLOR_NAMES, MAX_ANCHORS, SHAPE_NAMES, Plate, random_state, sample_scene

PLATE_COLOR, BACKGROUND_COLOR = len(COLOR_NAMES), len(COLOR_NAMES) + 1
BACKGROUND_SHAPE = len(SHAPE_NAMES)
TARGETS = {
    "color": BACKGROUND_COLOR + 1,
    "shape": BACKGROUND_SHAPE + 1,
    "size": 2,
    "left_digit": 10,
    "right_digit": 10,
    "row": PATCHES_PER_SIDE,
    "column": PATCHES_PER_SIDE,
}
"""Name and number of classes of each per-patch target."""
_MARGIN = 3
_CLEAR_OPACITY = 0.3


def patch_targets(boxes: list[Box]) -> np.ndarray:
    """Class of every patch for every target, (len(TARGETS), 12, 12) int64; IGNORE where it is undefined.

    A patch belongs to a box that contains its centre, give or take three pixels. Under objects of an opacity up to 0.3
    colour and shape are ignored: too little can be seen there to demand an answer from single patches.
    """
    targets = np.full((len(TARGETS), PATCHES_PER_SIDE, PATCHES_PER_SIDE), IGNORE, dtype=np.int64)
    color, shape, size, left_digit, right_digit, row, column = targets
    color[:], shape[:] = BACKGROUND_COLOR, BACKGROUND_SHAPE
    row[:] = np.arange(PATCHES_PER_SIDE)[:, None]
    column[:] = np.arange(PATCHES_PER_SIDE)[None, :]
    centers = np.arange(PATCHES_PER_SIDE) * PATCH_SIZE + PATCH_SIZE // 2
    for box in boxes:
        across = (centers > box.left - _MARGIN) & (centers < box.left + box.width + _MARGIN)
        down = (centers > box.top - _MARGIN) & (centers < box.top + box.height + _MARGIN)
        place = down[:, None] & across[None, :]
        item = box.item
        if isinstance(item, Plate):
            color[place] = PLATE_COLOR
            left_digit[place], right_digit[place] = item.digits
        elif item.opacity > _CLEAR_OPACITY:
            color[place] = COLOR_NAMES.index(item.color)
            shape[place] = SHAPE_NAMES.index(item.shape)
            size[place] = int(item.large)
        else:
            color[place] = shape[place] = IGNORE
    return targets


def pretraining_batch(seed: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples number ``first`` to ``first + count - 1`` of a seed's stream.

    Returns:
        Pixels (count, 96, 96, 3) uint8 and targets (len(TARGETS), count, 144) int64.
    """
    pixels, targets = [], []
    for number in range(first, first + count):
        rng = random_state(PRETRAINING_STREAM, seed, number)
        image, boxes = render(rng, sample_scene(rng, anchors=(1, MAX_ANCHORS)))
        pixels.append(image)
        targets.append(patch_targets(boxes))
    return np.stack(pixels), np.stack(targets, axis=1).reshape(len(TARGETS), count, -1)
