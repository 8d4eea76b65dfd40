"""Where the visual tokens of a prompt are, and which pixels each of them covers."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vlmattn.errors import CallError


@dataclass(frozen=True)
class Raster:
    """One grid of visual tokens of an image: all of it, or one of several pictures that the model sees of it.

    Attributes:
        grid: `(t, h, w)` in visual tokens, raster order.
        line: how many visual tokens a newline token follows; 0: there are none.
        tiles: numbers of rows, and of columns, of the tiles that the tower saw one by one; None: whole frames.
    """

    grid: tuple[int, int, int]
    line: int = 0
    tiles: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def length(self) -> int:
        """Visual tokens."""
        return math.prod(self.grid)

    @property
    def newlines(self) -> int:
        """Newline tokens among and behind the visual ones."""
        return self.length // self.line if self.line else 0


@dataclass(frozen=True)
class Span:
    """A run of visual tokens of one image or video in one sequence, with the newline tokens among them.

    Attributes:
        start: index of the first visual token in the (padded) sequence.
        length: number of visual tokens; newline tokens do not count.
        image: index of the image within its sample, in order of appearance.
        rasters: the grids the tokens stand in, one after another; empty where the family cannot know them.
    """

    start: int
    length: int
    image: int
    rasters: tuple[Raster, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """`(t, h, w)` of an image with one grid; None where there are several, or none is known."""
        return self.rasters[0].grid if len(self.rasters) == 1 else None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """`(t, h, w)` of every grid, in the order of the tokens."""
        return tuple(raster.grid for raster in self.rasters)

    @property
    def columns(self) -> int:
        """Columns of the sequence that belong to the image, newline tokens included."""
        return self.length + sum(raster.newlines for raster in self.rasters)

    def lines(self) -> list[tuple[int, int]]:
        """The column of every newline token, and how many visual tokens stand in the line that it ends."""
        found, column = [], self.start
        for raster in self.rasters:
            found += [(column + (raster.line + 1) * (n + 1) - 1, raster.line) for n in range(raster.newlines)]
            column += raster.length + raster.newlines
        return found


@dataclass(frozen=True)
class Geometry:
    """The map from the visual tokens of one image to rectangles of the original image.

    Attributes:
        grid: `(t, h, w)` visual tokens, raster order.
        size: `(width, height)` of the original image in pixels.
        origin: `(x, y)` of the grid's top left corner in original-image pixels; negative where the processor pads.
        cell: `(width, height)` of one visual token in original-image pixels.
        edges: where columns begin, `w + 1` numbers, and rows, `h + 1`, the end of the last one included, if not all of
            them are of the size `cell`, which is their mean then; None: they are.
        more: the other grids of the same image, in the order of their tokens.
    """

    grid: tuple[int, int, int]
    size: tuple[int, int]
    origin: tuple[float, float]
    cell: tuple[float, float]
    edges: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    more: tuple[Geometry, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens, `t * h * w` and those of the other grids."""
        return math.prod(self.grid) + sum(other.num_tokens for other in self.more)

    def rect(self, index: int) -> tuple[float, float, float, float]:
        """`(x0, y0, x1, y1)` in original-image pixels of visual token `index`, clipped to the image.

        Raises:
            IndexError: `index` is not a visual token of this image.
        """
        if not 0 <= index < self.num_tokens:
            raise IndexError(f"visual token {index} does not exist: this image has {self.num_tokens}")
        _, h, w = self.grid
        own = math.prod(self.grid)
        if index >= own:
            index -= own
            for other in self.more:
                if index < other.num_tokens:
                    return other.rect(index)
                index -= other.num_tokens
        row, column = divmod(index % (h * w), w)
        (x0, x1), (y0, y1) = self._edges(0, column), self._edges(1, row)
        width, height = self.size

        def clip(value: float, limit: int) -> float:
            return min(max(value, 0.0), float(limit))

        return clip(x0, width), clip(y0, height), clip(x1, width), clip(y1, height)

    def index(self, x: float, y: float) -> int | None:
        """The visual token (of the first grid and frame) that covers pixel `(x, y)`, or None where no token looks."""
        _, h, w = self.grid
        if self.edges is None:
            column = int((x - self.origin[0]) // self.cell[0])
            row = int((y - self.origin[1]) // self.cell[1])
        else:
            column, row = (bisect.bisect_right(edges, at) - 1 for edges, at in zip(self.edges, (x, y), strict=True))
        return row * w + column if 0 <= column < w and 0 <= row < h else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, what is not given left out."""
        found: dict[str, Any] = {name: list(getattr(self, name)) for name in ("grid", "size", "origin", "cell")}
        if self.edges is not None:
            found["edges"] = [list(edges) for edges in self.edges]
        return found | ({"more": [other.as_dict() for other in self.more]} if self.more else {})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Geometry:
        """What `as_dict` made a dict of."""
        grid, size, origin, cell = (tuple(given[name]) for name in ("grid", "size", "origin", "cell"))
        edges = tuple(tuple(side) for side in given["edges"]) if "edges" in given else None
        return cls(grid, size, origin, cell, cast(Any, edges), tuple(map(cls.from_dict, given.get("more", ()))))

    def _edges(self, axis: int, place: int) -> tuple[float, float]:
        """Where a column (axis 0) or row (axis 1) begins and ends."""
        if self.edges is not None:
            return self.edges[axis][place], self.edges[axis][place + 1]
        start = self.origin[axis] + place * self.cell[axis]
        return start, start + self.cell[axis]


def squarest(total: int) -> tuple[int, int, int]:
    """The `(1, h, w)` of `total` tokens that is nearest to a square, h <= w."""
    height = next(h for h in range(math.isqrt(total), 0, -1) if total % h == 0)
    return 1, height, total // height


def in_proportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in parts as large as `sizes` say, by rounding down the running sums."""
    bounds = [total * size // max(sum(sizes), 1) for size in itertools.accumulate(sizes, initial=0)]
    return [b - a for a, b in itertools.pairwise(bounds)]


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


def lay_out(kinds: Tensor, layouts: Mapping[int, Sequence[tuple[Raster, ...]]]) -> list[list[Span]]:
    """Cut the visual tokens of every row into images of which is known how their tokens lie.

    Args:
        kinds: `(B, N)` long, which kind of placeholder a token is, -1 for text.
        layouts: by kind the grids of each image of the batch, in order of samples; beams repeat those of their sample.

    Returns:
        A list of spans per row.

    Raises:
        CallError: the placeholders of a kind are not those of its images.
    """
    copies = 1
    for kind, images in layouts.items():
        wanted = sum(Span(0, sum(raster.length for raster in image), 0, image).columns for image in images)
        found = int((kinds == kind).sum())
        copies = found // max(wanted, 1)
        if not copies or found != copies * wanted:
            raise CallError(f"the prompts hold {found} visual placeholders, but their images have {wanted} tokens")
    waiting = {kind: iter(images) for kind, images in layouts.items()}
    rows: list[list[Span]] = []
    for row, flags in enumerate(kinds.tolist()):
        if row % copies:
            rows.append(rows[-1])
            continue
        spans: list[Span] = []
        position = 0
        while position < len(flags):
            if flags[position] < 0:
                position += 1
                continue
            rasters = next(waiting.get(flags[position], iter(())), None)
            if rasters is None:
                raise CallError(f"row {row} has more visual placeholders than its images have tokens")
            span = Span(position, sum(raster.length for raster in rasters), len(spans), rasters)
            if set(flags[position : position + span.columns]) != {flags[position]}:
                raise CallError(f"row {row} has fewer visual placeholders than its image {span.image} has tokens")
            spans.append(span)
            position += span.columns
        rows.append(spans)
    return rows


def line_lengths(spans: Sequence[Sequence[Span]], length: int, device: torch.device | str = "cpu") -> Tensor:
    """`(B, length)` long: at a newline token the visual tokens of the line that it ends, elsewhere 0."""
    lines = torch.zeros(len(spans), length, dtype=torch.long)
    for row, row_spans in enumerate(spans):
        for column, line in (pair for span in row_spans for pair in span.lines()):
            lines[row, column] = line
    return lines.to(device)


def chunk_index(spans: Sequence[Sequence[Span]], length: int, device: torch.device | str = "cpu") -> Tensor:
    """`(B, length)` long: the image, or frame of a video, each token belongs to, counting through the row; -1 for text.

    An image with several grids, or none that is known, is one chunk. Newline tokens are text.
    """
    index = torch.full((len(spans), length), -1, dtype=torch.long)
    for row, row_spans in enumerate(spans):
        first = 0
        for span in row_spans:
            frames = 1 if span.grid is None else span.grid[0]
            visual = torch.ones(span.columns, dtype=torch.bool)
            visual[[column - span.start for column, _ in span.lines()]] = False
            frame = (visual.cumsum(0) - 1) // (span.length // frames)
            index[row, span.start : span.start + span.columns] = torch.where(visual, first + frame, -1)
            first += frames
    return index.to(device)


def image_index(spans: Sequence[Sequence[Span]], length: int, device: torch.device | str = "cpu") -> Tensor:
    """`(B, length)` long: the image each token belongs to, newline tokens included, -1 for text."""
    index = torch.full((len(spans), length), -1, dtype=torch.long)
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            index[row, span.start : span.start + span.columns] = span.image
    return index.to(device)
