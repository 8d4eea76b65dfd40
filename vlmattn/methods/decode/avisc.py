"""AvisC: what the model says when it sees its blind tokens alone is subtracted.

Idea: a few visual tokens soak up attention whatever the question, while those that carry evidence get little; contrast
with a branch in which the embeddings of all but these blind tokens are zero. Woo et al., "Don't Miss the Forest for the
Trees: Attentional Vision Calibration for Large Vision Language Models", arXiv 2405.17820, section 4.

Deviations: every sample and image has its own threshold (the code takes one over the batch), layers are chosen per
sample over all its images; alpha = 0 leaves the model alone, the cutoff included. With other methods in the session the
attention is that of the changed model.

Cost: a second prefill behind the first, twice the keys and values; both branches decode in one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import Selector, View, param, register
from vlmattn.methods.calibrate import Branch, Contrast
from vlmattn.methods.prune._select import Pools

MASKS = ("zeros", "drop")


def chosen_layers(attended: Tensor, share: float) -> Tensor:
    """`(B, L)` bool, the fewest layers whose part in the attention to the image `(B, L, V)` reaches `share`."""
    part = attended.sum(-1)
    part = part / part.sum(1, keepdim=True).clamp_min(1e-30)
    ranked, order = part.sort(dim=1, descending=True, stable=True)
    count = ((ranked.cumsum(1) < share).sum(1, keepdim=True) + 1).clamp_max(part.shape[1])
    place = torch.arange(part.shape[1], device=part.device)
    return torch.zeros_like(part, dtype=torch.bool).scatter(1, order, place < count)


def blind(weight: Tensor, present: Tensor, lam: float) -> Tensor:
    """`(P, W)` bool, tokens with at least mean + lam * std of the attention `(P, W)` to the tokens of their pool."""
    count = present.sum(1, keepdim=True)
    mean = (weight * present).sum(1, keepdim=True) / count.clamp_min(1)
    variance = ((weight - mean).square() * present).sum(1, keepdim=True) / (count - 1).clamp_min(1)
    return (weight >= mean + lam * variance.sqrt()) & present


@dataclass(frozen=True)
class BlindTokens(Selector):
    """Leaves the blind tokens as they are; the others are zeroed, or dropped."""

    name: ClassVar[str] = "avisc"

    share: float
    lam: float
    mask: str
    before_layer: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings."""
        return frozenset({"layer_input"})

    def select(self, view: View) -> Keep:
        """By the mean over the chosen layers of what the last token of the first branch pays."""
        assert view.attended is not None and view.hidden is not None
        layers = chosen_layers(view.attended, self.share)[..., None]
        weight = (view.attended * layers).sum(1) / layers.sum(1)
        pools = Pools.of(view)
        stays = pools.keep(blind(pools.split(weight), pools.present, self.lam)).mask
        if self.mask == "drop":
            return Keep(stays)

        def zeroed(x: Tensor) -> Tensor:
            return x * stays[..., None].to(x)

        return Keep(torch.ones_like(stays), zeroed(view.hidden), zeroed)


@register(
    "avisc",
    title="Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models",
    paper="2405.17820",
)
@dataclass(frozen=True)
class AvisC(Contrast):
    """Subtract the logits that the model has when it sees only the tokens that soak up attention."""

    alpha: float = param(2.5, "how much of the second branch is subtracted; 0 changes nothing")
    share: float = param(0.5, "layers are chosen until they have this share of the attention to the image")
    lam: float = param(1.0, "tokens are blind above mean + lam * standard deviation of the attention")
    mask: str = param("zeros", "the other tokens' embeddings become 'zeros', or 'drop' out of the prompt")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._number("share", "a number in [0, 1]", lambda value: 0 <= value <= 1)
        self._number("lam", "a finite number", math.isfinite)
        self._one_of("mask", MASKS)

    @property
    def branch(self) -> Branch:
        """The prompt with its blind tokens alone, known when the first branch is prefilled."""
        return Branch(selector=BlindTokens(self.share, self.lam, self.mask), attention=True)
