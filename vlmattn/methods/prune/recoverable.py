"""Recoverable Compression: outliers of the visual attention, and outliers of the similarity with the question.

Idea: the CLS token picks what stands out in the image, the question then recovers what it misses, and clusters take up
some of the rest; how many of each is the share of outliers among the scores, not a budget. Chen et al., "Recoverable
Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information", arXiv 2409.01179.

With a_j what the CLS row of the tower's last layer, all heads as one, gives to patch j, and s_j = cos(question, patch
j) / sqrt(P) in the space of the tower's CLIP model, and the share of outliers that of local outlier factors above 1.5:
(1) the V rho(a) best by a stay; (2) of the others, with s of the first set to its minimum, the (V - K_v) rho(s) best
by s stay; (3) in the rest R, the |R| rho(a in R) best by a are centres and become `x_i + sum a_j x_j` over their 32
nearest others in R by cos(key_i, key_j) + 50 s_j, and one extra token is `sum a_j x_j` over what is in R and no
centre.

Deviations: the number of tokens is limited to `min_tokens` (more of (2)) and `max_share` of the image (fewer centres,
then fewer of (2), then of (1)). The question's end token and patches behind the tower's last norm are compared, as
CLIP is made; centres are a share of R and keys are their own. `faithful_bugs=True` is the released code: the last
padded position, patches before the norm, centres a share of the number of features, and keys of other tokens. Kept
tokens stay in raster order and keep their positions (the code's order is `order=code, positions=compact`); the extra
token sits on the slot of the best token that does not stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import POSITIONS, Look, Selector, View, param, register
from vlmattn.methods.prune._select import Pools, absorbed, outliers, ranks, remainder, rewritten


@register("recoverable", title="Recoverable Compression", paper="2409.01179")
@dataclass(frozen=True)
class Recoverable(Selector):
    """Keep the outliers of the CLS attention and of the similarity with the question, and clusters of the rest."""

    entry_only: ClassVar[bool] = True

    neighbours: int = param(20, "neighbours of the outlier factors of the two filters")
    merge_neighbours: int = param(10, "neighbours of the outlier factor that counts centres")
    cluster: int = param(32, "tokens that are merged into each centre")
    text_weight: float = param(50.0, "weight of the question in who is near a centre")
    merging: bool = param(True, "whether centres and the extra token are made of the rest")
    min_tokens: int = param(16, "at least so many tokens stay of an image that has them")
    max_share: float = param(0.5, "at most this share of an image's tokens stays")
    order: str = param("raster", "'raster', or the 'code's: main tokens, centres, the extra one")
    faithful_bugs: bool = param(False, "the released code to the letter")
    before_layer: int | None = param(None, "0, the entry of the text model; the same as None")
    positions: str = param("original", "'original': kept tokens keep their positions; 'compact': they are renumbered")

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            LayerError, SpecError: a parameter is out of range.
        """
        super().__post_init__()
        for field in ("neighbours", "merge_neighbours", "cluster", "min_tokens"):
            self._count(field, 1)
        self._number("text_weight", "a finite number", math.isfinite)
        self._number("max_share", "a share in (0, 1]", lambda share: 0 < share <= 1)
        self._flag("merging", "faithful_bugs")
        for field, words in (("order", ("raster", "code")), ("positions", POSITIONS)):
            self._one_of(field, words)

    def disabled(self) -> None:
        """Nothing: it has no strength."""

    @property
    def requires(self) -> frozenset[str]:
        """The text tower beside the vision tower."""
        return super().requires | {"text_tower"}

    @property
    def adaptive(self) -> bool:
        """True."""
        return True

    @property
    def merges(self) -> bool:
        """True with `merging`."""
        return self.merging

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, and the way of merged features into them."""
        return frozenset({"layer_input", "projector"})

    @property
    def looks(self) -> Mapping[str, Look]:
        """The last layer's CLS row, keys and output, and the features."""
        return {"attention": Look("joined", -1), "keys": Look("keys", -1), "states": Look("states", -1)} | {
            "features": Look("features")
        }

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """A tenth, what the paper finds on average, within the limits."""
        return min(max(round(0.1 * visual), min(self.min_tokens, visual)), max(int(self.max_share * visual), 1))

    def select(self, view: View) -> Keep:
        """Both filters, then centres and the extra token."""
        assert view.hidden is not None and view.project is not None
        pools = Pools.of(view)
        score, similar = pools.split(view.vision["attention"]), pools.split(self._similarity(view))
        main = self._filtered(score, similar, pools)
        if not self.merging:
            return pools.keep(main)
        rest = pools.present & ~main
        features, keys = pools.split(view.vision["features"]), pools.split(view.vision["keys"]).flatten(2)
        if self.faithful_bugs:  # the code looks keys of the rest up by their number in the rest
            number = (rest.long().cumsum(1) - 1).clamp_min(0)[..., None]
            keys = keys.gather(1, number.expand_as(keys))
        centre = self._centres(score, rest, main, features.shape[-1])
        values, changed = absorbed(features, keys, score, centre, rest, self.cluster, self.text_weight * similar)
        at, token = remainder(features, score, rest & ~centre & centre.any(1, keepdim=True))
        values = torch.where(at[..., None], token, values)
        kept = main | centre | at
        rows = rewritten(pools.split(view.hidden), values, changed | at, view.project)
        return pools.keep(kept, rows, None if self.order == "raster" else centre.long() + 2 * at.long())

    def _similarity(self, view: View) -> Tensor:
        """`(B, V)` fp32, of the question with every patch."""
        assert view.paired is not None
        patches = view.paired.patches(view.vision["states"], not self.faithful_bugs).float()
        text = (view.paired.last if self.faithful_bugs else view.paired.text[:, 0]).float()
        return torch.nn.functional.cosine_similarity(patches, text[:, None], dim=-1) / patches.shape[-1] ** 0.5

    def _filtered(self, score: Tensor, similar: Tensor, pools: Pools) -> Tensor:
        """`(P, W)` bool: the best by `score`, and of the others the best by `similar`."""
        there, size = pools.present, pools.sizes
        limit, least = (size * self.max_share).long().clamp_min(1), size.clamp_max(self.min_tokens)
        first = outliers(score, there, self.neighbours).sum(1).minimum(limit)
        seen = (ranks(score, there) < first[:, None]) & there
        lowest = similar.masked_fill(~there, torch.inf).amin(1, keepdim=True)
        found = outliers(torch.where(seen, lowest, similar), there, self.neighbours).sum(1)
        second = (size - first) * found // size.clamp_min(1)
        second = second.maximum(least - first).minimum(limit - first)
        return seen | ((ranks(similar, there & ~seen) < second[:, None]) & there & ~seen)

    def _centres(self, score: Tensor, rest: Tensor, main: Tensor, width: int) -> Tensor:
        """`(P, W)` bool, the best of the rest; as many as its scores have outliers, and as there is room for."""
        found = outliers(score, rest, self.merge_neighbours).sum(1)
        if self.faithful_bugs:
            found = width * found // rest.sum(1).clamp_min(1)
        size = (rest | main).sum(1)
        room = (size * self.max_share).long().clamp_min(1) - main.sum(1) - 1
        return (ranks(score, rest) < found.minimum(room)[:, None]) & rest
