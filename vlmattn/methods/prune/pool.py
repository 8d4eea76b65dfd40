"""Spatial pooling: the grid of visual tokens becomes a smaller one by averaging, the baseline that changes values.

The grid of each frame is pooled to gh x gw cells with gh = round(sqrt(n * h / w)) and gw = floor(n / gh), which may
overlap by a row (as torch's adaptive pooling), or in squares of `size` tokens; where these do not fill the grid, the
last row and column of cells hold what is left. `average` and `max` are over the tokens of a cell, `bilinear`
interpolates between token centres. A pooled token stands at the token in the middle of its cell, rows and columns
rounded down. Of an image with several grids each is pooled by itself. Averaging shrinks norms; `rescale` gives each
token the pooled norm of those it is made of. Before layer 0 features are pooled as they come out of the projector; the
forms are our own choice. Features that a model adds again behind later layers (DeepStack) are pooled alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Keep
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Pruner, View, param, register
from vlmattn.spans import squarest

MODES = ("average", "max", "bilinear")

Grid = tuple[int, int, int]


def pooled(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """A grid `(t, h, w, C)` pooled to `(t, height, width, C)`, in fp32."""
    planes = x.float().permute(0, 3, 1, 2)
    if mode == "average":
        planes = torch.nn.functional.adaptive_avg_pool2d(planes, (height, width))
    elif mode == "max":
        planes = torch.nn.functional.adaptive_max_pool2d(planes, (height, width))
    else:
        planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)


def squares(x: Tensor, size: int, mode: str) -> Tensor:
    """A grid `(t, h, w, C)` pooled in squares of `size` tokens, `(t, ceil(h / size), ceil(w / size), C)`, in fp32.

    Squares at the far edges hold what the grid has left for them.
    """
    if mode == "bilinear":
        return pooled(x, -(-x.shape[1] // size), -(-x.shape[2] // size), mode)
    pool = torch.nn.functional.avg_pool2d if mode == "average" else torch.nn.functional.max_pool2d
    return pool(x.float().permute(0, 3, 1, 2), size, ceil_mode=True).permute(0, 2, 3, 1)


def middles(total: int, size: int) -> list[int]:
    """The middle of each run of `size` places, the last one of what is left, rounded down; ascending."""
    return [(first + min(first + size, total) - 1) // 2 for first in range(0, total, size)]


def centres(total: int, cells: int) -> list[int]:
    """The middle of each of `cells` runs that cover `total` places, rounded down; ascending."""
    bounds = [(i * total // cells, -(-(i + 1) * total // cells) - 1) for i in range(cells)]
    return [(first + last) // 2 for first, last in bounds]


def _middles(grid: Grid, cells: tuple[int, int], size: int | None) -> Tensor:
    """The tokens in the middle of the cells of every frame of a grid, counted through it; of squares with a `size`."""
    places = (
        centres(total, count) if size is None else middles(total, size)
        for total, count in zip(grid[1:], cells, strict=True)
    )
    down, across = map(torch.tensor, places)
    return torch.arange(math.prod(grid)).view(grid)[:, down][:, :, across].flatten()


@register("pool", title="Spatial pooling (baseline)")
@dataclass(frozen=True)
class Pool(Pruner):
    """Make of the grid of visual tokens a smaller one by pooling."""

    instead_of_keep: ClassVar[str] = "size"

    mode: str = param("average", "'average' or 'max' of each cell, or 'bilinear' interpolation")
    size: int | None = param(None, "pool squares of that many tokens a side, in place of `keep`")
    rescale: bool = param(False, "whether a pooled token gets the pooled norm of its tokens")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("mode", MODES)
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise SpecError(f"pool.size={self.size!r}: expected an int >= 1, or None")
        if not isinstance(self.rescale, bool):
            raise SpecError(f"pool.rescale={self.rescale!r}: expected True or False")
        if self.budget_scope != "image":
            raise SpecError("pool makes a grid of every image by itself: only budget_scope='image' makes sense")

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`, or squares of one token."""
        return super().is_noop if self.size is None else self.size == 1

    def disabled(self) -> Pool:
        """The same with `keep=1.0`."""
        return Pool(keep=1.0, before_layer=self.before_layer, mode=self.mode)

    @property
    def merges(self) -> bool:
        """Always."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """The rows to pool."""
        return frozenset({"layer_input"})

    def select(self, view: View) -> Keep:
        """The tokens in the middle of the cells, with the cells' values."""
        assert view.hidden is not None
        mask = torch.zeros_like(view.image, dtype=torch.bool)
        grids: list[tuple[int, Tensor, Grid, tuple[int, int], Tensor]] = []
        for row, spans in enumerate(view.spans):
            for span in spans:
                where = (view.image[row] == span.image).nonzero()[:, 0]
                if len(where) == 0:
                    continue
                for grid, mine in zip(span.grids, where.split(self._whole(len(where), span.grids)), strict=True):
                    cells = self._cells(grid, len(mine) / len(where))
                    chosen = mine[_middles(grid, cells, self.size).to(mine.device)]
                    mask[row, chosen] = True
                    grids.append((row, mine, grid, cells, chosen))

        def merge(features: Tensor) -> Tensor:
            rows = features.clone()
            for row, mine, grid, cells, chosen in grids:
                rows[row, chosen] = self._values(features[row, mine].view(*grid, -1), cells).to(rows)
            return rows

        return Keep(mask, merge(view.hidden), merge)

    def _values(self, x: Tensor, cells: tuple[int, int]) -> Tensor:
        """Rows `(t, h, w, C)` of a grid to those of its cells, `(cells, C)` fp32."""
        small = self._pooled(x, cells)
        if self.rescale:
            norm = self._pooled(x.float().norm(dim=-1, keepdim=True), cells)
            small = torch.nn.functional.normalize(small, dim=-1) * norm
        return small.flatten(0, 2)

    def _pooled(self, x: Tensor, cells: tuple[int, int]) -> Tensor:
        """Rows of a grid to `(t, cells, C)`, in squares or in cells of a budget."""
        return pooled(x, *cells, self.mode) if self.size is None else squares(x, self.size, self.mode)

    def left(self, visual: int, grid: Grid | None = None, stage: int = 0) -> int:
        """The cells of all frames."""
        whole = squarest(visual) if grid is None else grid
        self._whole(visual, [whole])
        return whole[0] * math.prod(self._cells(whole, 1.0))

    def _whole(self, total: int, grids: Sequence[Grid]) -> list[int]:
        """Tokens of each grid of an image."""
        sizes = [math.prod(grid) for grid in grids]
        if sum(sizes) != total:
            shown = ", ".join(map(str, grids)) or None
            raise CallError(
                f"{self}: needs the whole grid of an image, but {total} tokens of grid {shown} are left: put it before "
                "the other pruners"
            )
        return sizes

    def _cells(self, grid: Grid, share: float) -> tuple[int, int]:
        """Rows and columns of cells in a frame of a grid with that share of an image's tokens."""
        frames, height, width = grid
        if self.size is not None:
            return -(-height // self.size), -(-width // self.size)
        total = math.prod(grid)
        keep = self.keep if isinstance(self.keep, float) or share == 1 else max(int(self.keep * share), 1)
        wanted = max(budget.count(total, keep) // frames, 1)
        rows = min(max(round(math.sqrt(wanted * height / width)), 1), height, wanted)
        return rows, min(wanted // rows, width)
