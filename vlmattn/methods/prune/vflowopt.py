"""VFlowOpt: pruning in three stages by how much the important patches of the vision tower look at a token.

Idea: a token matters if the patches that the whole image looks at look at it. The least important ones are first
recycled in small cells of the grid before the language model, and two more times the least important are dropped
inside it. Yang et al., "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", arXiv 2508.05211.

With A the attention of the tower's second last layer, mean over heads: G are the tokens that receive more than
`threshold` times the mean; the importance of a token is the mean attention that G gives it, plus `alpha` (0 in all
released settings) times the softmax over the image of the entropy of its gray values. Before the language model, of V
tokens the round(V (1 - r_v)) + int(V / cell^2) least important are candidates; those in the same cell of `cell` x
`cell` grid positions become one token, their mean weighted by importance, at the place of the most important of them.
Before two later layers a share 1 - r_1 and 1 - r_2 of the tokens that arrive, the least important ones, is dropped.
`keep` is the mean share of visual tokens over all layers, (r_v k_1 + r_v r_1 (k_2 - k_1) + r_v r_1 r_2 (L - k_2)) / L:
r_2 follows from it.

Deviations: what is not given is taken from the paper's searched settings for a model of 28 layers at 10, 25 and 50 %,
linear in `keep` between them (the search for a model of your own is not done here). If no token is above the threshold,
all count, and a warning says so (the code has NaN). Images are recycled one by one, also where a prompt has several;
videos, and tokens without a grid, are ranked only. Attention in the language model is causal throughout (under SDPA the
code's is not in one layer). A token that joins several patches gets the sum of their attention. Entropies are those of
the picture's values (the code wraps normalised ones around), as the processor given to `wrap` normalised them, or by
CLIP's mean and deviation where none was given.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import BudgetError, SpecError, VlmattnWarning
from vlmattn.methods.base import Look, Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, ranks

RELEASED = {
    "entry": ((0.1, 0.1166), (0.25, 0.2651), (0.5, 0.7233), (1.0, 1.0)),
    "middle": ((0.1, 1.0), (0.25, 0.9833), (0.5, 0.7487), (1.0, 1.0)),
    "threshold": ((0.1, 39.26), (0.25, 34.76), (0.5, 28.68)),
    "cell": ((0.1, 17.39), (0.25, 15.58), (0.5, 11.76)),
}
"""The searched settings by mean share of tokens: r_v, r_1, threshold and cell."""


@register("vflowopt", title="VFlowOpt: Visual Information Flow-Guided Pruning", paper="2508.05211")
@dataclass(frozen=True)
class VFlowOpt(Pruner):
    """Recycle, then drop twice, the tokens that the vision tower's important patches look at least."""

    paper_layers: ClassVar[tuple[int, ...]] = (0, 9, 18)
    paper_depth: ClassVar[int] = 28
    entry_only: ClassVar[bool] = True

    keep: float = param(0.5, "mean share of visual tokens over all layers, a float in (0, 1]")
    before_layer: int | tuple[int, ...] | None = param(
        None, "three layers, the first 0; None: the paper's at this depth"
    )
    entry: float | None = param(None, "r_v, share that is left before the language model; None: by `keep`")
    middle: float | None = param(None, "r_1, share of these that the second stage leaves; None: by `keep`")
    threshold: float | None = param(None, "times the mean attention that an important token receives; None: by `keep`")
    cell: float | None = param(None, "side of a recycling cell in tokens; None: by `keep`")
    alpha: float = param(0.0, "weight of the entropy of a token's pixels in its importance, in [-1, 1]")
    recycle: bool = param(True, "whether the first stage merges what it drops")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if not isinstance(self.keep, float):
            raise BudgetError(f"vflowopt.keep={self.keep!r}: give the mean share over all layers, a float in (0, 1]")
        if self.entry is not None:
            self._number("entry", "a share in (0, 1], or None", lambda share: 0 < share <= 1)
        if self.middle is not None:
            self._number("middle", "a share in (0, 1], or None", lambda share: 0 < share <= 1)
        if self.threshold is not None:
            self._number("threshold", "a finite number >= 0, or None", lambda times: 0 <= times < math.inf)
        if self.cell is not None:
            self._number("cell", "a finite number >= 1, or None", lambda side: 1 <= side < math.inf)
        self._number("alpha", "a number in [-1, 1]", lambda weight: -1 <= weight <= 1)
        self._flag("recycle")
        if self.recycle and self.budget_scope == "sample":
            raise SpecError("vflowopt recycles within an image: budget_scope='sample' needs recycle=False")

    @property
    def adaptive(self) -> bool:
        """True with `recycle`: cells may be empty."""
        return self.recycle

    @property
    def merges(self) -> bool:
        """True with `recycle`."""
        return self.recycle

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, to merge them."""
        return frozenset({"layer_input"})

    @property
    def looks(self) -> Mapping[str, Look]:
        """The attention of important tokens in the second last layer, and the entropy of pixels if it has a weight."""
        looks = {"attention": Look("weighted", -2, self.important)}
        return looks | ({"entropy": Look("entropy", None, self.softmax)} if self.alpha else {})

    def important(self, received: Tensor, present: Tensor) -> Tensor:
        """`(P, W)` weights of the tokens' own rows: equal ones for those that receive enough, of all if none does."""
        mean = received.masked_fill(~present, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
        threshold = self._setting("threshold")
        chosen = (received > threshold * mean) & present
        found = chosen.any(1, keepdim=True)
        if not bool(found.all()):
            warnings.warn(
                f"{self}: no token of an image receives more than {threshold:.4g} times the mean attention (there can "
                f"be none among {math.floor(threshold)} tokens or fewer), so that all count: give a lower `threshold`",
                VlmattnWarning,
                stacklevel=2,
            )
        chosen = torch.where(found, chosen, present)
        return chosen / chosen.sum(1, keepdim=True).clamp_min(1)

    def softmax(self, entropy: Tensor, present: Tensor) -> Tensor:
        """`(P, W)` of the entropies of an image."""
        return entropy.masked_fill(~present, -torch.inf).softmax(1)

    def importance(self, view: View) -> Tensor:
        """`(B, V)` fp32, the same in every stage."""
        attention = view.vision["attention"].float()
        return attention + self.alpha * view.vision["entropy"] if self.alpha else attention

    def select(self, view: View) -> Keep:
        """Recycle at the entry, drop the least important later."""
        assert view.hidden is not None
        pools = Pools.of(view, self.budget_scope)
        share = self.shares(view.num_layers)[view.stage]
        importance = pools.split(self.importance(view))
        fewer = torch.floor(pools.sizes * (1 - share) + 0.5).long()
        place = ranks(importance, pools.present)
        if view.stage or not self.recycle:
            return pools.keep(place < (pools.sizes - fewer)[:, None])
        return self._recycled(pools, importance, place, fewer)

    def _recycled(self, pools: Pools, importance: Tensor, place: Tensor, fewer: Tensor) -> Keep:
        """The tokens that are no candidates, and one for the candidates of every cell."""
        assert pools.view.hidden is not None
        cell, whole = self._cells(pools)
        more = (pools.sizes / self._setting("cell") ** 2).long() * (whole & (fewer > 0))
        candidate = pools.present & (place >= (pools.sizes - fewer - more)[:, None])
        merged = candidate & whole[:, None]
        best = torch.full_like(place, pools.width).scatter_reduce(
            1, cell, place.masked_fill(~merged, pools.width), "amin"
        )
        head = merged & (place == best.gather(1, cell))
        hidden = pools.split(pools.view.hidden)
        weight, x = importance * merged, hidden.float()
        wide = cell[..., None].expand_as(x)
        total = torch.zeros_like(x).scatter_add(1, wide, x * weight[..., None]).gather(1, wide)
        mass = torch.zeros_like(weight).scatter_add(1, cell, weight).gather(1, cell)
        members = torch.zeros_like(cell).scatter_add(1, cell, merged.long()).gather(1, cell)
        changed = head & (members > 1) & (mass > 0)
        rows = torch.where(changed[..., None], (total / mass[..., None]).to(hidden), hidden)
        return pools.keep(~candidate | head, rows)

    def _cells(self, pools: Pools) -> tuple[Tensor, Tensor]:
        """`(P, W)` long, the cell of every token, and `(P,)` bool, the pools that have cells: those of one image."""
        images = pools.slot.shape[1]
        grids = [
            [span.grid if span.grid and span.grid[0] == 1 else None for span in row] + [None] * (images - len(row))
            for row in pools.view.spans
        ]
        width = torch.tensor([grid[2] if grid else 0 for row in grids for grid in row], device=pools.slot.device)
        side, whole = self._setting("cell"), width > 0
        index, across = torch.arange(pools.width, device=width.device), width.clamp_min(1)[:, None]
        column, row = (index % across / side).long(), (index // across / side).long()
        cell = row * torch.ceil(across / side).long() + column
        return torch.where(whole[:, None] & pools.present, cell, 0), whole

    def shares(self, num_layers: int) -> tuple[float, float, float]:
        """`(r_v, r_1, r_2)`, what every stage leaves of what arrives, in a model of `num_layers` layers.

        Raises:
            BudgetError: no share of the last stage gives `keep`.
        """
        _, second, third = self.stages(num_layers)
        entry, middle = self._setting("entry"), self._setting("middle")
        spent = entry * second + entry * middle * (third - second)
        last = (self.keep * num_layers - spent) / (entry * middle * (num_layers - third))
        if not 0 < last <= 1 + 1e-9:
            raise BudgetError(
                f"{self}: after r_v={entry:.4g} and r_1={middle:.4g} before layers 0 and {second} of {num_layers} the "
                f"last stage would have to leave a share of {last:.4g}: give other `entry` and `middle`, or `keep`"
            )
        return entry, middle, min(last, 1.0)

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """What the three shares leave; recycling may leave a few tokens more or less."""
        counts, left = [visual] * num_layers, visual
        if visual and not self.is_noop:
            for layer, share in zip(self.stages(num_layers), self.shares(num_layers), strict=True):
                left -= math.floor(left * (1 - share) + 0.5)
                counts[layer:] = [left] * (num_layers - layer)
        return counts

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """What a stage leaves in a model as deep as the paper's."""
        return self.expected_tokens(visual, self.paper_depth, grid)[self.paper_layers[stage]]

    def _setting(self, field: str) -> float:
        """A field, or what the searched settings say for `keep`."""
        given = getattr(self, field)
        if given is not None:
            return given
        known = RELEASED[field]
        if self.keep <= known[0][0]:  # below the settings: shares shrink with `keep`, the rest stays
            return known[0][1] * (self.keep / known[0][0] if field == "entry" else 1.0)
        for (low, a), (high, b) in itertools.pairwise(known):
            if self.keep <= high:
                return a + (b - a) * (self.keep - low) / (high - low)
        return known[-1][1]
