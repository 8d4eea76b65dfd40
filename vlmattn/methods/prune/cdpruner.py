"""CDPruner: visual tokens that differ from each other and matter for the question, by a determinantal point process.

Idea: the volume that the kept tokens span, each stretched by its relevance to the question, rewards relevance and
diversity at once; it is maximised greedily. Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional
Diversity for Token Pruning in MLLMs", arXiv 2506.10967.

With cosines S of the projected tokens and relevances r in (0, 1], the kernel is r_i S_ij r_j. `relevance="clip"` is
the paper's: minus the mean cosine between a patch and the segments of the question in the space of the CLIP model that
the tower belongs to (patches that matter score low there: the minus is right), which needs that model's text tower.
`"embeddings"` takes the cosine between a projected token and the mean embedding of the question's tokens, for models
that have no text tower; `"none"` is pure diversity, r = 1. Results with the last two are not the paper's method.

Deviations from the released code: relevances are scaled to (0, 1] in every image (the code takes minimum and maximum
of the whole batch, so that samples depend on each other: `scale="batch"`); when the kernel has no rank left the most
relevant tokens follow (the code goes on with NaN); kept tokens keep their positions (`positions="compact"` is the
code's). The question is all text behind the last image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import SpecError
from vlmattn.methods.base import Look, Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, cosine, dpp_greedy, first_picks

FLOOR = 1e-6
"""Least relevance, so that a token that does not matter can still be picked."""


@register("cdpruner", title="Beyond Attention or Similarity: Conditional Diversity", paper="2506.10967")
@dataclass(frozen=True)
class CDPruner(Pruner):
    """Keep the tokens that a determinantal point process with question-conditioned qualities picks."""

    entry_only: ClassVar[bool] = True

    keep: float | int = param(64, "share (float in (0, 1]) or number (int) of the visual tokens that stays")
    relevance: str = param("clip", "'clip' (paper; needs a text tower), 'embeddings' of the question, or 'none'")
    theta: float | None = param(None, "weight of the relevance in (0, 1), r <- exp(r * theta / (2 - 2 theta)); None: r")
    scale: str = param("image", "relevances are scaled within the 'image', or within the 'batch' (code)")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("relevance", ("clip", "embeddings", "none"))
        self._one_of("scale", ("image", "batch"))
        if self.theta is not None and not (isinstance(self.theta, float) and 0 < self.theta < 1):
            raise SpecError(f"cdpruner.theta={self.theta!r}: expected a float in (0, 1), or None")

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, and the question."""
        return frozenset({"layer_input"} | ({"text_rows"} if self.relevance == "embeddings" else set()))

    @property
    def requires(self) -> frozenset[str]:
        """A paired text tower, for the paper's relevance."""
        return super().requires | ({"text_tower"} if self.relevance == "clip" else set())

    @property
    def looks(self) -> Mapping[str, Look]:
        """What the paired tower can compare with the question."""
        return {"states": Look("states")} if self.relevance == "clip" else {}

    def select(self, view: View) -> Keep:
        """The greedy picks of every pool."""
        assert view.hidden is not None
        pools = Pools.of(view, self.budget_scope)
        counts = self.groups(view)[1].flatten()
        quality = self._quality(pools.split(self._relevance(view)), pools.present)
        if self.theta is not None:
            quality = torch.exp(quality * (self.theta / (2 - 2 * self.theta)))
        order = dpp_greedy(cosine(pools.split(view.hidden)), quality, pools.present, int(counts.max()))
        return pools.keep(first_picks(order, counts, pools.width))

    def _relevance(self, view: View) -> Tensor:
        """`(B, V)` fp32."""
        assert view.hidden is not None
        if self.relevance == "clip":
            assert view.paired is not None
            patches = torch.nn.functional.normalize(view.paired.patches(view.vision["states"], True).float(), dim=-1)
            text = torch.nn.functional.normalize(view.paired.text.float(), dim=-1)
            cosines = (patches @ text.mT).masked_fill(~view.paired.segments[:, None], 0.0)
            return -cosines.sum(-1) / view.paired.segments.sum(1, keepdim=True).clamp_min(1)
        if self.relevance == "none":
            return view.hidden.new_zeros(view.hidden.shape[:2], dtype=torch.float32)
        assert view.text is not None
        asked = torch.where(view.text.after.any(1, keepdim=True), view.text.after, view.text.real)
        mean = (view.text.hidden.float() * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp_min(1)
        return torch.nn.functional.cosine_similarity(view.hidden.float(), mean[:, None], dim=-1)

    def _quality(self, relevance: Tensor, present: Tensor) -> Tensor:
        """`(P, W)` in (0, 1]; 1 where all are equal."""
        low = relevance.masked_fill(~present, math.inf).amin(1, keepdim=True)
        high = relevance.masked_fill(~present, -math.inf).amax(1, keepdim=True)
        if self.scale == "batch":
            low, high = low.amin(), high.amax()
        return torch.where(high > low, (relevance - low + FLOOR) / (high - low), 1.0)
