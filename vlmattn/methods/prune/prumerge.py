"""PruMerge: as many tokens as the attention of CLS has outliers, each with its neighbours merged in.

Idea: the CLS token attends to a few patches far more than to the rest; these outliers (above Q3 + 1.5 (Q3 - Q1)) stay,
and every one takes along what the tokens with the most similar keys say. Shang et al., "PruMerge: Adaptive Token
Reduction for Efficient Large Multimodal Models", arXiv 2403.15388.

In the tower's last layer, with all heads as one, a_j is what the CLS row gives to patch j. The K = number of outliers
best tokens stay; each becomes `x_i + sum a_j x_j` over its 32 nearest others by the cosine of keys; one extra token is
`sum a_j x_j` over all that do not stay. PruMerge+ (`plus=True`) also keeps every s-th token, s = int(int(1 / r) / 3)
with r = K / V, before merging.

Deviations from the released code: quartiles are those of each image (the code takes the batch), and at least one token
stays; the extra token sits on the slot of the best token that does not; kept tokens stay in raster order and keep
their positions (the code's order by score without gaps is `order=score, positions=compact`). `keep` fixes the number
of tokens, the extra one included; PruMerge+ then spends a quarter of them on the best and spreads the others evenly
over the rest. Towers without CLS rank by the attention received, which the paper does not try; where the projector
joins patches, its output is merged. The paper's headline numbers are those of models tuned for it; this is the
training-free form.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Keep
from vlmattn.errors import VlmattnWarning
from vlmattn.methods.base import POSITIONS, Look, Selector, View, param, register
from vlmattn.methods.prune._select import Pools, absorbed, quantile, ranks, remainder, rewritten

HEADS = {"one": "joined", "mean": "attention"}
TYPICAL = 0.055
"""The share of outliers that the paper finds on average."""


@register("prumerge", title="PruMerge: Adaptive Token Reduction", paper="2403.15388")
@dataclass(frozen=True)
class PruMerge(Selector):
    """Keep the outliers of the CLS attention, each with its neighbours merged in, and one token for the rest."""

    entry_only: ClassVar[bool] = True

    keep: float | int | None = param(None, "share or number of tokens that stays; None: as many as there are outliers")
    plus: bool = param(False, "PruMerge+: keep evenly spread tokens as well")
    factor: float = param(1.5, "quartile distances above the third quartile at which an outlier begins")
    neighbours: int = param(32, "tokens that are merged into each token that stays")
    extra: bool = param(True, "whether one more token holds what does not stay")
    heads: str = param("one", "attention with all heads as 'one' (code), or the 'mean' over heads")
    order: str = param("raster", "'raster', or by 'score' (code): best first, spread ones, the extra one")
    before_layer: int | None = param(None, "0, the entry of the text model; the same as None")
    positions: str = param("original", "'original': kept tokens keep their positions; 'compact': they are renumbered")

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            BudgetError, LayerError, SpecError: a parameter is out of range.
        """
        super().__post_init__()
        if self.keep is not None:
            budget.check(self.keep, "prumerge.keep")
        for field, words in (("heads", tuple(HEADS)), ("order", ("raster", "score")), ("positions", POSITIONS)):
            self._one_of(field, words)
        self._flag("plus", "extra")
        self._count("neighbours", 0)
        self._number("factor", "a finite number >= 0", lambda factor: 0 <= factor < math.inf)

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def disabled(self) -> PruMerge:
        """The same method with `keep=1.0`."""
        return dataclasses.replace(self, keep=1.0)

    @property
    def adaptive(self) -> bool:
        """True without `keep`."""
        return self.keep is None

    @property
    def merges(self) -> bool:
        """True."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, and the way of merged features into them."""
        return frozenset({"layer_input", "projector"})

    @property
    def looks(self) -> Mapping[str, Look]:
        """The last layer's CLS row and keys, and the features."""
        return {"attention": Look(HEADS[self.heads], -1), "keys": Look("keys", -1), "features": Look("features")}

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """The budget; without one what an image with the paper's share of outliers has left."""
        if self.keep is not None:
            return budget.count(visual, self.keep)
        best = budget.count(visual, TYPICAL)
        spread = len(range(0, visual - 1, max(visual // best // 3, 1))) if self.plus else 0
        return min(best + spread + int(self.extra), visual)

    def select(self, view: View) -> Keep:
        """The best tokens and those spread between them, with their neighbours, and the extra token."""
        assert view.hidden is not None and view.project is not None
        pools = Pools.of(view)
        there, score = pools.present, pools.split(view.vision["attention"])
        score = score.mean(-1) if score.ndim == 3 else score
        place = ranks(score, there)
        best, spread, whole = self._chosen(score, place, there)
        kept = best | spread
        features, keys = pools.split(view.vision["features"]), pools.split(view.vision["keys"]).flatten(2)
        values, changed = absorbed(features, keys, score, kept, there, self.neighbours)
        order = torch.where(best, place, pools.width + torch.arange(pools.width, device=place.device))
        if self.extra:
            at, token = remainder(features, score, there & ~kept & ~whole[:, None])
            values, changed, kept = torch.where(at[..., None], token, values), changed | at, kept | at
            order = order.masked_fill(at, 2 * pools.width)
        rows = rewritten(pools.split(view.hidden), values, changed, view.project)
        return pools.keep(kept, rows, None if self.order == "raster" else order)

    def _chosen(self, score: Tensor, place: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that stay for their attention, those for their place, `(P, W)` bool each, and `(P,)` bool, the
        pools that these leave no room for an extra token in."""
        size = there.sum(1)
        if self.keep is None:
            low, high = quantile(score, there, 0.25), quantile(score, there, 0.75)
            bound = high + self.factor * (high - low)
            outliers = ((score > bound[:, None]) & there).sum(1).clamp_min(1)
            best = (place < outliers[:, None]) & there
            spread = self._spread(size, outliers, there & ~best) if self.plus else torch.zeros_like(best)
            return best, spread, torch.zeros_like(size, dtype=torch.bool)
        total = torch.tensor([budget.count(n, self.keep) if n else 0 for n in size.tolist()], device=size.device)
        whole = (total == 1) | (total == size)
        room = total - (~whole & self.extra).long()
        first = ((room + 2) // 4).clamp_min(1) if self.plus else room
        best = (place < first[:, None]) & there
        rest = there & ~best
        step = rest.cumsum(1) * (room - first)[:, None] // rest.sum(1, keepdim=True).clamp_min(1)
        return best, rest & (step > torch.nn.functional.pad(step, (1, 0))[:, :-1]), whole

    def _spread(self, size: Tensor, outliers: Tensor, rest: Tensor) -> Tensor:
        """PruMerge+'s evenly spread tokens; the last of an image is never one, as in the code."""
        step = (size // outliers // 3).clamp_min(1)[:, None]
        if bool(((step == 1)[:, 0] & (size > 0)).any()):
            warnings.warn(
                f"{self} keeps every token of an image whose attention has outliers in more than a sixth of it: give "
                "`keep` to fix the number",
                VlmattnWarning,
                stacklevel=2,
            )
        index = torch.arange(rest.shape[1], device=rest.device)
        return rest & (index % step == 0) & (index < size[:, None] - 1)
