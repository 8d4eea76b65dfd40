"""Where the visual tokens of a prompt are, and which pixels each of them covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import CallError


@dataclass(frozen=True)
class Span:
    """A run of visual tokens of one image or video in one sequence.

    Attributes:
        start: index of the first visual token in the (padded) sequence.
        length: number of visual tokens.
        image: index of the image within its sample, in order of appearance.
        grid: `(t, h, w)` in visual tokens, raster order, or None where the family cannot know it.
    """

    start: int
    length: int
    image: int
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Geometry:
    """The map from the visual tokens of one image to rectangles of the original image.

    Attributes:
        grid: `(t, h, w)` visual tokens, raster order.
        size: `(width, height)` of the original image in pixels.
        origin: `(x, y)` of the grid's top left corner in original-image pixels; negative where the processor pads.
        cell: `(width, height)` of one visual token in original-image pixels.
    """

    grid: tuple[int, int, int]
    size: tuple[int, int]
    origin: tuple[float, float]
    cell: tuple[float, float]

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens, `t * h * w`."""
        t, h, w = self.grid
        return t * h * w

    def rect(self, index: int) -> tuple[float, float, float, float]:
        """`(x0, y0, x1, y1)` in original-image pixels of visual token `index`, clipped to the image.

        Raises:
            IndexError: `index` is not a visual token of this image.
        """
        if not 0 <= index < self.num_tokens:
            raise IndexError(f"visual token {index} does not exist: this image has {self.num_tokens}")
        _, h, w = self.grid
        row, column = divmod(index % (h * w), w)
        x0, y0 = self.origin[0] + column * self.cell[0], self.origin[1] + row * self.cell[1]
        width, height = self.size

        def clip(value: float, limit: int) -> float:
            return min(max(value, 0.0), float(limit))

        return clip(x0, width), clip(y0, height), clip(x0 + self.cell[0], width), clip(y0 + self.cell[1], height)

    def index(self, x: float, y: float) -> int | None:
        """The visual token (of the first frame) that covers pixel `(x, y)`, or None where no token looks."""
        _, h, w = self.grid
        column = int((x - self.origin[0]) // self.cell[0])
        row = int((y - self.origin[1]) // self.cell[1])
        return row * w + column if 0 <= column < w and 0 <= row < h else None


def squarest(total: int) -> tuple[int, int, int]:
    """The `(1, h, w)` of `total` tokens that is nearest to a square, h <= w."""
    height = next(h for h in range(math.isqrt(total), 0, -1) if total % h == 0)
    return 1, height, total // height


def find_spans(visual: Tensor, tokens_per_image: int | None) -> list[list[Span]]:
    """Cut the visual tokens of every row into one span per image.

    Args:
        visual: `(B, N)` bool, True at visual tokens.
        tokens_per_image: where all images take the same number of tokens; None: an image is a contiguous run.

    Returns:
        A list of spans per row.

    Raises:
        CallError: the visual tokens of a row are not a whole number of images.
    """
    rows: list[list[Span]] = []
    for row, flags in enumerate(visual.tolist()):
        spans: list[Span] = []
        position = 0
        while position < len(flags):
            if not flags[position]:
                position += 1
                continue
            end = position
            while end < len(flags) and flags[end]:
                end += 1
            while position < end:
                size = tokens_per_image or end - position
                if size > end - position:
                    raise CallError(
                        f"row {row} has a run of {end - position} visual tokens where an image takes {size}: "
                        "let the processor expand the image placeholders, or check that prompt and images match"
                    )
                spans.append(Span(position, size, len(spans)))
                position += size
        rows.append(spans)
    return rows


def image_index(spans: Sequence[Sequence[Span]], length: int, device: torch.device | str = "cpu") -> Tensor:
    """`(B, length)` long: the image each token belongs to, -1 for text."""
    index = torch.full((len(spans), length), -1, dtype=torch.long)
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            index[row, span.start : span.start + span.length] = span.image
    return index.to(device)
