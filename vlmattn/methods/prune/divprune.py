"""DivPrune: keep the visual tokens that differ most from each other.

Idea: what is worth keeping of an image is what no other kept token says already, so that the smallest distance between
kept tokens is made as large as possible, greedily. No attention and no text is needed. Alvar et al., "DivPrune:
Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175.

Deviations from the released code: every sample and image is a pool of its own (the code takes one run of sample 0; all
images of a prompt together are `budget_scope="sample"`); distances are fp32, and a token that is picked is never
picked again (in the code duplicates give token 0 again and again); kept tokens keep their positions,
`positions="compact"` is the code's. A video is one pool. Before a later layer the same search runs on that layer's
input.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.edits import Keep
from vlmattn.methods.base import Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, cosine, farthest_first, first_picks


@register("divprune", title="DivPrune: Diversity-based Visual Token Pruning", paper="2503.02175")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keep the visual tokens that lie farthest apart: greedy max-min distance of cosines."""

    keep: float | int = param(0.098, "share (float in (0, 1]) or number (int) of the arriving visual tokens that stays")

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings."""
        return frozenset({"layer_input"})

    def select(self, view: View) -> Keep:
        """The first picks of every pool."""
        assert view.hidden is not None
        pools = Pools.of(view, self.budget_scope)
        counts = self.groups(view)[1].flatten()
        order = farthest_first(cosine(pools.split(view.hidden)), pools.present, int(counts.max()))
        return pools.keep(first_picks(order, counts, pools.width))
