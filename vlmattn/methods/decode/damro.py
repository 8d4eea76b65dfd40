"""DAMRO: what the model says when it sees only the outliers of the vision tower is subtracted.

Idea: the CLS token of the vision tower looks at a few background patches whatever the image shows, and the decoder
follows it there; contrast with a branch whose image consists of these patches alone. Gong et al., "DAMRO: Dive into the
Attention Mechanism of LVLM to Reduce Object Hallucination", arXiv 2410.04514.

Deviations: logits processors and warpers act behind the combination (the code skips them); towers without CLS rank
patches by the attention they receive, which is DAMRO-style only; models with positions in several axes cannot renumber
the outliers and need `positions=original`. alpha = 0 leaves the model alone, the cutoff included. The released code has
one alpha a benchmark (0.5 for POPE, 1.5 for captions, 2 for MME); 0.5 is our choice by analogy.

Cost: a prefill of the text and k tokens, and their keys and values; both branches decode in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import POSITIONS, Selector, View, param, register
from vlmattn.methods.calibrate import Branch, Contrast
from vlmattn.methods.prune._select import Pools
from vlmattn.methods.views import Look

ORDERS = ("score", "raster")


def outliers(score: Tensor, present: Tensor, k: int) -> Tensor:
    """`(P, min(k, W))` long, the tokens of each pool by falling score `(P, W)`; the lower index first among equals."""
    return score.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :k]


@dataclass(frozen=True)
class Outliers(Selector):
    """Keeps the k patches of each image that the CLS token looks at most."""

    name: ClassVar[str] = "damro"

    k: int
    order: str
    positions: str = "compact"
    before_layer: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, to put them into the order of their scores."""
        return frozenset({"layer_input"})

    @property
    def looks(self) -> Mapping[str, Look]:
        """The CLS row as if all heads were one, in the layer whose output the projector reads."""
        return {"row": Look("joined")}

    def select(self, view: View) -> Keep:
        """The outliers, by falling score on the slots of theirs that come first, or where they stand."""
        assert view.hidden is not None
        pools = Pools.of(view)
        score = pools.split(view.vision["row"]).float()
        kept = torch.zeros_like(pools.present).scatter(1, outliers(score, pools.present, self.k), True)
        if self.order == "raster":
            return pools.keep(kept)
        return pools.keep(kept & pools.present, pools.split(view.hidden), place=-score)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """k, or all if there are fewer."""
        return min(self.k, visual)


@register(
    "damro",
    title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
    paper="2410.04514",
)
@dataclass(frozen=True)
class DAMRO(Contrast):
    """Subtract the logits that the model has when it sees only the outliers of the vision tower."""

    alpha: float = param(0.5, "how much of the second branch is subtracted; 0 changes nothing")
    k: int = param(10, "outliers of each image")
    order: str = param("score", "the outliers stand by falling 'score' or in 'raster' order")
    positions: str = param("compact", "'compact': the outliers' positions are counted; 'original': they keep theirs")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._count("k", 1)
        self._one_of("order", ORDERS)
        self._one_of("positions", POSITIONS)

    @property
    def requires(self) -> frozenset[str]:
        """Positions that can be renumbered, if they are."""
        return frozenset({"flat_positions"}) if self.positions == "compact" else frozenset()

    @property
    def branch(self) -> Branch:
        """The prompt with an image of k tokens."""
        return Branch(selector=Outliers(self.k, self.order, self.positions))
