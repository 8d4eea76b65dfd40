"""Oracle box: only the tokens inside a given box stay, the upper bound for whatever asks about one object.

The box is a fraction of what the vision tower sees, `(left, top, right, bottom)`, and is given for a question, by hand
or by an evaluation that knows the truth: `session.set("oraclebox.box", (0.1, 0.2, 0.4, 0.6))`. A token stays if its
cell overlaps the box, so that at least one does, in an image of several grids of every grid.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Selector, View, param, register
from vlmattn.spans import squarest

WHOLE = (0.0, 0.0, 1.0, 1.0)


@register("oraclebox", title="Ground-truth box (baseline)")
@dataclass(frozen=True)
class OracleBox(Selector):
    """Keep the visual tokens inside a box."""

    before_layer: int = param(0, "0-indexed decoder layer whose input is pruned (0: before the LLM)")
    box: tuple[float, float, float, float] = param(WHOLE, "(left, top, right, bottom) as fractions of the grid")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        try:
            left, top, right, bottom = (float(value) for value in self.box)
        except (TypeError, ValueError) as error:
            raise SpecError(f"oraclebox.box={self.box!r}: expected (left, top, right, bottom)") from error
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise SpecError(f"oraclebox.box={self.box!r}: expected 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
        object.__setattr__(self, "box", (left, top, right, bottom))

    @property
    def is_noop(self) -> bool:
        """True for the whole grid."""
        return self.box == WHOLE

    def disabled(self) -> OracleBox:
        """The whole grid."""
        return dataclasses.replace(self, box=WHOLE)

    def select(self, view: View) -> Keep:
        """The tokens whose cells overlap the box."""
        mask = torch.zeros_like(view.image, dtype=torch.bool)
        for row, spans in enumerate(view.spans):
            for span in spans:
                if not span.rasters:
                    raise CallError(f"{self}: the grid of an image is not known")
                here = view.image[row] == span.image
                inside = torch.cat([self._inside(grid) for grid in span.grids])
                mask[row, here] = inside.to(mask.device)[view.index[row, here]]
        return Keep(mask)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """Cells that overlap the box."""
        return int(self._inside(squarest(visual) if grid is None else grid).sum())

    def _inside(self, grid: tuple[int, int, int]) -> Tensor:
        """`(t * h * w,)` bool."""
        left, top, right, bottom = self.box
        rows, columns = self._run(top, bottom, grid[1]), self._run(left, right, grid[2])
        return (rows[:, None] & columns).expand(grid).flatten()

    @staticmethod
    def _run(low: float, high: float, cells: int) -> Tensor:
        """Cells of a side that overlap [low, high]: those whose inside has a point of it."""
        first, last = math.floor(low * cells + 1e-9), math.ceil(high * cells - 1e-9)
        place = torch.arange(cells)
        return (place >= first) & (place < max(last, first + 1))
