"""Uniform pruning: an even stride over the visual tokens, the spatial baseline of HiRED and FEATHER in exact-count
form.

`mode="1d"`: of the V tokens of an image in raster order keep those at floor((i + 0.5) * V / n), i = 0..n-1.
`mode="2d"`: rows floor((i + 0.5) * h / gh) and columns alike with gh = round(sqrt(n * h / w)), gw = floor(n / gh);
this keeps gh * gw <= n tokens, and `exact_budget` fills up with the 1-D picks among the unused; of an image with
several grids each gets its share of n. Both forms are our own choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmattn import budget
from vlmattn.edits import Keep
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Pruner, View, param, register
from vlmattn.spans import in_proportion, squarest


def picks(total: int, n: int) -> list[int]:
    """`n` evenly spread indices out of `total`, centred, strictly increasing."""
    return [int((i + 0.5) * total / n) for i in range(n)]


def picks_2d(height: int, width: int, n: int) -> list[int]:
    """At most `n` raster indices on an even sub-grid of a `height` x `width` grid."""
    rows = min(max(round(math.sqrt(n * height / width)), 1), height)
    columns = min(max(n // rows, 1), width)
    return [row * width + column for row in picks(height, rows) for column in picks(width, columns)]


@register("uniform", title="Uniform stride (baseline)")
@dataclass(frozen=True)
class Uniform(Pruner):
    """Keep an evenly spread subset of the visual tokens."""

    mode: str = param("1d", "'1d': even stride in raster order; '2d': even sub-grid, at most the budget")
    exact_budget: bool = param(False, "with mode='2d': fill up to the budget with 1-D picks among the unused")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("mode", ("1d", "2d"))
        if not isinstance(self.exact_budget, bool):
            raise SpecError(f"uniform.exact_budget={self.exact_budget!r}: expected True or False")
        if self.budget_scope != "image":
            raise SpecError("uniform spreads over every image by itself: only budget_scope='image' makes sense")

    def select(self, view: View) -> Keep:
        """Even picks in every image."""
        mask = torch.zeros(view.image.shape, dtype=torch.bool)
        image, present = view.image.cpu(), view.counts.tolist()
        for row, spans in enumerate(view.spans):
            for span in spans:
                total = present[row][span.image]
                if total == 0:
                    continue
                chosen = self._choose(total, span.grids)
                where = (image[row] == span.image).nonzero()[:, 0]
                mask[row, where[torch.tensor(chosen)]] = True
        return Keep(mask.to(view.image.device))

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """The budget; on a sub-grid what fits into it."""
        return len(self._choose(visual, (squarest(visual) if grid is None else grid,)))

    def _choose(self, total: int, grids: Sequence[tuple[int, int, int]]) -> list[int]:
        wanted = budget.count(total, self.keep)
        if self.mode == "1d":
            return picks(total, wanted)
        sizes = [math.prod(grid) for grid in grids]
        if sum(sizes) != total:
            shown = ", ".join(map(str, grids)) or None
            raise CallError(
                f"{self}: needs the whole grid of an image, but {total} tokens of grid {shown} are left: use "
                "mode='1d', or put it before the other pruners"
            )
        chosen: set[int] = set()
        starts = itertools.accumulate(sizes, initial=0)
        for start, part, (frames, height, width) in zip(starts, in_proportion(wanted, sizes), grids, strict=False):
            per_frame, area = max(part // frames, 1), height * width
            inside = picks_2d(height, width, min(per_frame, area))
            chosen |= {start + frame * area + i for frame in range(frames) for i in inside}
        if self.exact_budget and len(chosen) < wanted:
            unused = [i for i in range(total) if i not in chosen]
            chosen |= {unused[i] for i in picks(len(unused), wanted - len(chosen))}
        return sorted(chosen)
