"""HiRED: the visual tokens that the vision tower's CLS token attends to most.

Idea: what CLS looks at in the layer whose output the projector reads is what an image is about; a fixed share of these
tokens stays, whatever the question. Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of
High-Resolution Vision-Language Models", arXiv 2408.10945.

This is the paper's form for one crop. Its budgets for an image in tiles (half for the whole image, the rest by the
share of early attention that falls on each tile) need a family that cuts images into tiles; images and frames that
come one by one are served as the code serves crops without a whole image: every frame of a video gets an equal share.

Deviations from the released code: the budget is the nearest number of tokens and what division leaves over goes to the
first frames (`exact_budget=False`: rounded down, as in the code, but at least one token of an image or video stays);
kept tokens keep their positions (`positions="compact"` is the code's). Towers without CLS rank by the attention
received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Keep
from vlmattn.methods.base import Look, Pruner, View, param, register


@register("hired", title="HiRED: Attention-Guided Token Dropping", paper="2408.10945")
@dataclass(frozen=True)
class HiRED(Pruner):
    """Keep the tokens that CLS attends to most, every frame its share."""

    entry_only: ClassVar[bool] = True

    keep: float | int = param(0.2, "share (float in (0, 1]) or number (int) of the visual tokens that stays")
    exact_budget: bool = param(True, "spend what rounding down would leave over")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._flag("exact_budget")

    @property
    def looks(self) -> Mapping[str, Look]:
        """The CLS row of the feature layer."""
        return {"attention": Look("attention")}

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """The budget of an image."""
        if self.exact_budget or isinstance(self.keep, int):
            return budget.count(arriving, self.keep)
        return max(int(arriving * self.keep), 1)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """The budget; of a video what its frames' budgets make together."""
        frames = grid[0] if grid and self.budget_scope == "image" else 1
        return sum(tile_budgets([1] * frames, self.quota(visual, visual, stage), visual // frames, self.exact_budget))

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention, summed over heads."""
        return view.vision["attention"].sum(-1)

    def select(self, view: View) -> Keep:
        """The best of every frame."""
        group, counts = self.groups(view)
        if self.budget_scope == "image":
            frames = [[span.grid[0] if span.grid else 1 for span in row] for row in view.spans]
            group, counts = self._by_frame(view, counts, frames)
        return Keep.top(self.score(view), group, counts)

    def _by_frame(self, view: View, counts: Tensor, frames: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Groups and budgets with every frame of an image a group of its own."""
        most = max((n for row in frames for n in row), default=1)
        if most == 1:
            return view.image, counts
        images, device = counts.shape[1], counts.device
        area = torch.ones_like(counts)
        shares = torch.zeros(*counts.shape, most, dtype=torch.long, device=device)
        for row, spans in enumerate(view.spans):
            for span, n in zip(spans, frames[row], strict=True):
                size = span.length // n
                area[row, span.image] = size
                budgets = tile_budgets([1] * n, int(counts[row, span.image]), size, self.exact_budget)
                shares[row, span.image, :n] = torch.tensor(budgets, device=device)
        group = view.image * most + view.index // area.gather(1, view.image.clamp_min(0))
        return torch.where(view.image >= 0, group, -1), shares.view(-1, images * most)


def tile_budgets(counts: list[int], total: int, cap: int, exact: bool = True) -> list[int]:
    """How many of `total` tokens each tile or frame may keep: in proportion to `counts`, at most `cap` each.

    Args:
        counts: tokens of the tile that early attention picks, or any other weight.
        total: of all tiles.
        cap: tokens of a tile.
        exact: spend what rounding down and `cap` leave over, the largest fractions first; if not, only one token where
            otherwise none would stay.
    """
    weight = sum(counts)
    budgets = [min(total * count // max(weight, 1), cap) for count in counts]
    left = total - sum(budgets) if exact else int(total > 0 and not any(budgets))
    by_fraction = sorted(range(len(counts)), key=lambda tile: -(total * counts[tile] % max(weight, 1)))
    while left > 0 and (room := [tile for tile in by_fraction if budgets[tile] < cap]):
        each = max(left // len(room), 1)
        for tile in room[:left]:
            more = min(each, cap - budgets[tile])
            budgets[tile], left = budgets[tile] + more, left - more
    return budgets
