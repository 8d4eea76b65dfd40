"""Images at any resolution: one picture of the whole image, and a mosaic of tiles in its own proportions.

The processor scales the image to fit the best of some canvases, pads it there and cuts the canvas into tiles of the
tower's size. The model puts the tiles' tokens together again, cuts off rows or columns of padding, may shrink the
mosaic, and ends every row of it with a newline token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmattn.spans import Geometry, Raster

Pair = tuple[int, int]
"""Of rows and of columns."""


@dataclass(frozen=True)
class Mosaic:
    """The tiles of one image.

    Attributes:
        tiles: how many there are.
        skipped: rows and columns of padding that are cut off at the top and at the left, and as many at the other end.
        shown: tokens in the prompt; fewer than are left after cutting where the model shrinks the mosaic.
    """

    tiles: Pair
    skipped: Pair
    shown: Pair


@dataclass(frozen=True)
class Picture:
    """One image as the model sees it.

    Attributes:
        side, patch: of what the tower sees at a time, in pixels.
        mosaic: None: the image is seen as a whole only, and a newline token follows.
    """

    side: int
    patch: int
    mosaic: Mosaic | None = None

    @property
    def cells(self) -> int:
        """Tokens a side of what the tower sees at a time."""
        return self.side // self.patch

    @property
    def crops(self) -> int:
        """How many pictures the tower sees."""
        return 1 + (math.prod(self.mosaic.tiles) if self.mosaic else 0)

    @property
    def rasters(self) -> tuple[Raster, ...]:
        """The grids of its tokens."""
        n = self.cells
        if self.mosaic is None:
            return (Raster((1, n, n), line=n * n),)
        height, width = self.mosaic.shown
        tiles = tuple(self._runs(axis) for axis in (0, 1))
        return Raster((1, n, n)), Raster((1, height, width), line=width, tiles=(tiles[0], tiles[1]))

    def arrange(self, crops: Tensor) -> Tensor:
        """`(crops, n * n, C)` of tower tokens to `(n_i, C)` of the visual tokens in the prompt's order."""
        if self.mosaic is None:
            return crops[0]
        n, (rows, columns), (top, left) = self.cells, self.mosaic.tiles, self.mosaic.skipped
        whole = crops[1:].view(rows, columns, n, n, -1).transpose(1, 2).reshape(rows * n, columns * n, -1)
        whole = whole[top : rows * n - top, left : columns * n - left]
        if whole.shape[:2] != self.mosaic.shown:
            planes = whole.float().permute(2, 0, 1)[None]
            planes = torch.nn.functional.interpolate(planes, self.mosaic.shown, mode="bilinear")
            whole = planes[0].permute(1, 2, 0).to(crops)
        return torch.cat([crops[0], whole.flatten(0, 1)])

    def geometry(self, size: Pair) -> Geometry:
        """The map to the pixels of an image of `(width, height)` that is stretched to the tower's size as a whole."""
        reach = self.cells * self.patch / self.side
        cell = (size[0] * reach / self.cells, size[1] * reach / self.cells)
        more = () if self.mosaic is None else (self._tiled(size, self.mosaic),)
        return Geometry((1, self.cells, self.cells), size, (0.0, 0.0), cell, more=more)

    def padded_geometry(self, size: Pair) -> Geometry:
        """The map to the pixels of an image that is padded to a square."""
        longest = max(size)
        cell = longest * self.patch / self.side
        origin = (-((longest - size[0]) // 2), -((longest - size[1]) // 2))
        return Geometry((1, self.cells, self.cells), size, (float(origin[0]), float(origin[1])), (cell, cell))

    def _tiled(self, size: Pair, mosaic: Mosaic) -> Geometry:
        canvas = (mosaic.tiles[1] * self.side, mosaic.tiles[0] * self.side)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        edges = []
        for axis, (length, whole) in enumerate(zip(size, canvas, strict=True)):
            scaled = whole if whole / length == scale else min(math.ceil(length * scale), whole)
            before = (whole - scaled) // 2
            edges.append(tuple((edge - before) * length / scaled for edge in self._edges(1 - axis, mosaic)))
        (x, y), (height, width) = edges, mosaic.shown
        cell = ((x[-1] - x[0]) / width, (y[-1] - y[0]) / height)
        return Geometry((1, height, width), size, (x[0], y[0]), cell, edges=(x, y))

    def _edges(self, axis: int, mosaic: Mosaic) -> list[float]:
        """Where rows (axis 0) or columns begin on the canvas, and the end; a tile may end in pixels of no patch."""
        n = self.cells
        edge = [float(at // n * self.side + at % n * self.patch) for at in range(mosaic.tiles[axis] * n + 1)]
        edge = edge[mosaic.skipped[axis] : len(edge) - mosaic.skipped[axis]]
        left, shown = len(edge) - 1, mosaic.shown[axis]
        if left == shown:
            return edge
        places = [place * left / shown for place in range(shown)]
        found = [edge[int(at)] + (at - int(at)) * (edge[int(at) + 1] - edge[int(at)]) for at in places]
        return [*found, edge[-1]]

    def _runs(self, axis: int) -> tuple[int, ...]:
        """Rows (axis 0) or columns of the mosaic by the tile that their middle lies in."""
        assert self.mosaic is not None
        tiles, skipped, shown = self.mosaic.tiles[axis], self.mosaic.skipped[axis], self.mosaic.shown[axis]
        left = tiles * self.cells - 2 * skipped
        # the first row whose middle lies behind a bound: (row + 0.5) * left / shown + skipped >= bound
        bounds = [math.ceil((tile * self.cells - skipped) * shown / left - 0.5) for tile in range(1, tiles)]
        bounds = [0, *(min(max(bound, 0), shown) for bound in bounds), shown]
        return tuple(b - a for a, b in pairwise(bounds))


def picture(config: Any, size: Sequence[int], most: int | None = None) -> Picture:
    """An image of `(height, width)` pixels as the model of `config` sees it, in tiles.

    Args:
        most: how many times the tokens of one tile the mosaic may have before it shrinks; None: any.
    """
    from transformers.image_processing_utils import select_best_resolution

    seen = whole(config)
    height, width = (int(length) for length in size)
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    tiles = (canvas[0] // seen.side, canvas[1] // seen.side)
    rows, columns = tiles[0] * seen.cells, tiles[1] * seen.cells
    skipped = (0, 0)
    if width / height > columns / rows:
        skipped = ((rows - int(round(height * (columns / width), 7))) // 2, 0)
    else:
        skipped = (0, (columns - int(round(width * (rows / height), 7))) // 2)
    left = (rows - 2 * skipped[0], columns - 2 * skipped[1])
    ratio = 0.0 if most is None else math.sqrt(math.prod(left) / (most * seen.cells**2))
    shown = (int(left[0] // ratio), int(left[1] // ratio)) if ratio > 1.1 else left
    return Picture(seen.side, seen.patch, Mosaic(tiles, skipped, shown))


def whole(config: Any) -> Picture:
    """An image that is seen as a whole only."""
    return Picture(config.vision_config.image_size, config.vision_config.patch_size)


def arranged(pictures: Sequence[Picture], crops: Tensor) -> list[Tensor]:
    """What the tower has of all crops `(crops, n * n, ...)`, as `(n_i, ...)` of the visual tokens of each image."""
    flat = crops.flatten(2) if crops.ndim > 2 else crops[..., None]
    parts = flat.split([picture.crops for picture in pictures])
    return [picture.arrange(part).view(-1, *crops.shape[2:]) for picture, part in zip(pictures, parts, strict=True)]


def pooled(frames: Tensor, videos: int) -> list[Tensor]:
    """What the tower has of the frames of all videos `(frames, n * n, ...)`, with frames shrunk to half their side."""
    side = math.isqrt(frames.shape[1])
    planes = frames.flatten(2) if frames.ndim > 2 else frames[..., None]
    planes = planes.float().transpose(1, 2).unflatten(2, (side, side))
    small = torch.nn.functional.interpolate(planes, [math.ceil(side / 2)] * 2, mode="bilinear")
    rows = small.flatten(2).transpose(1, 2).to(frames)
    return list(rows.reshape(videos, -1, *frames.shape[2:]))


def real_crops(pictures: Sequence[Picture], pixels: Tensor) -> Tensor:
    """`(crops, 3, H, W)` of `(images, most crops, 3, H, W)` without those that fill up the batch."""
    if pixels.ndim == 4:
        return pixels
    return torch.cat([crops[: picture.crops] for picture, crops in zip(pictures, pixels, strict=True)])


def filled(pixels: Tensor) -> list[Tensor]:
    """The crops of each image of `(images, most crops, ...)` without the zeros that fill up the batch."""
    counts = [int((crops != 0).flatten(1).any(1).sum()) for crops in pixels]
    return [crops[: max(count, 1)] for crops, count in zip(pixels, counts, strict=True)]
