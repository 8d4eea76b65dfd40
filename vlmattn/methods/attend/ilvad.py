"""ILVAD: visual tokens that light up between layers are evidence; they are raised, and text that rests on them too.

Idea: in a first short answer, note which visual tokens switch from little to much attention from one layer to the next
(a sink is on in every layer and scores 0): the evidence E = exp(alpha * S). Then answer from scratch: in the half of
the heads that look most at evidence, visual probabilities are multiplied by E; in the half that look most at text,
those of earlier text by how much that text itself looked at evidence; the row is normalised again. Xie et al., "ILVAD:
Inter-Layer Visual Attention Discrepancy", arXiv 2605.20965.

For every layer l, A_l is the attention of the first answer on the visual tokens (mean over the half of the heads that
see most of the image, and over the steps after the first token), b_l = [A_l > tau * mean(A_l)] and
S = sum over l >= 1 of max(b_l - b_(l-1), 0), clipped to mean +- 3 standard deviations and scaled to [0, 1]. Text that
was read or written before has the score w = sum over edited layers of sum_j log E_j * (mean attention of the half of
the heads that look most at evidence), clipped and scaled likewise; its factor is w + beta.

Cost: the first answer, `tokens` long, whatever the length of the second; for answers of a word that is more than
double.

Deviations from the released code: samples of a batch are apart and their steps end with their own answers; scores that
are all equal make no factor (the code divides by 0); bounds are taken after clipping, and S is not set to 0 where the
attention averaged over layers is below its mean (`official_quirk=True` does both as the code). Sessions with several
images treat their visual tokens as one set. `beta` is 1 for yes/no questions; for captions the code has 0.3 in layers 5
to 25.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import VISUAL_GROUPS, AttnEdit, Boost
from vlmattn.methods.attend._layers import LayerRange
from vlmattn.methods.base import param, register
from vlmattn.methods.rehearsal import Rehearser


def scaled(x: Tensor, there: Tensor, quirk: bool) -> tuple[Tensor, Tensor]:
    """Values in [0, 1] after clipping to mean +- 3 standard deviations, and whether they differ at all.

    Args:
        x: `(B, n)` fp32.
        there: `(B, n)` bool, which count.
        quirk: take the bounds before clipping.

    Returns:
        `(B, n)` fp32 and `(B, 1)` bool.
    """
    x = torch.where(there, x, 0.0)
    count = there.sum(1, keepdim=True)
    mean = x.sum(1, keepdim=True) / count.clamp_min(1)
    square = torch.where(there, (x - mean).square(), 0.0).sum(1, keepdim=True)
    reach = 3 * (square / (count - 1).clamp_min(1)).sqrt()
    clipped = torch.maximum(torch.minimum(x, mean + reach), mean - reach)
    bounded = x if quirk else clipped
    low = bounded.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    high = bounded.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    differ = high > low
    return torch.where(there & differ, (clipped - low) / torch.where(differ, high - low, 1.0), 0.0), differ


def discrepancy(attention: Tensor, present: Tensor, tau: float, quirk: bool = False) -> Tensor:
    """`(B, V)` fp32, S: how often a token switches on between layers.

    Args:
        attention: `(L, B, V)` fp32, A_l.
        present: `(B, V)` bool, False at padding.
        tau: on is above this times the layer's mean.
        quirk: 0 for tokens whose mean over layers is below that of all.
    """
    count = present.sum(1, keepdim=True).clamp_min(1)
    on = (attention > tau * (attention * present).sum(-1, keepdim=True) / count) & present
    switched = (on[1:] & ~on[:-1]).sum(0).float()
    if quirk:
        whole = attention.mean(0)
        switched = torch.where(whole < (whole * present).sum(1, keepdim=True) / count, 0.0, switched)
    return switched


@register("ilvad", title="ILVAD: Inter-Layer Visual Attention Discrepancy", paper="2605.20965")
@dataclass(frozen=True)
class ILVAD(LayerRange, Rehearser):
    """Answer twice: raise the visual tokens that lit up between layers the first time, and text that rests on them."""

    alpha: float = param(5.0, "evidence is exp(alpha * S), S in [0, 1]; 0 changes nothing")
    tau: float = param(5.0, "a visual token is on above this times the mean attention of its layer")
    tokens: int = param(10, "tokens of the first answer, at least 2")
    text: bool = param(True, "whether earlier text is weighed by the evidence it looked at")
    beta: float = param(1.0, "added to the scaled score of text; below 1 text without evidence is damped")
    first_layer: int | None = param(0, "first decoder layer that is edited")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the last but one")
    official_quirk: bool = param(False, "bounds before clipping, and no evidence where mean attention is below average")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._number("alpha", "a number >= 0", lambda value: 0 <= value < math.inf)
        self._number("tau", "a number > 0", lambda value: 0 < value < math.inf)
        self._number("beta", "a number > 0", lambda value: 0 < value < math.inf)
        self._count("tokens", 2)
        self._flag("text", "official_quirk")

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0."""
        return self.alpha == 0

    @property
    def grounds(self) -> bool:
        """Whether text is weighed."""
        return self.text

    def disabled(self) -> ILVAD:
        """The same edit with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    def paper_layers(self, num_layers: int) -> tuple[int, int]:
        """All but the last."""
        return 0, num_layers - 2

    def evidence(self, seen: Tensor, valid: Tensor, present: Tensor) -> Tensor:
        """alpha * S."""
        weight = valid.float() / valid.sum(0).clamp_min(1)
        attention = torch.einsum("tlbv,tb->lbv", seen, weight)
        switched = discrepancy(attention, present, self.tau, self.official_quirk)
        return self.alpha * scaled(switched, present, self.official_quirk)[0]

    def boosts(self, image: Tensor, grounding: Tensor | None, text: Tensor) -> tuple[Boost, ...]:
        """E on visual keys, and w + beta on text that has a score."""
        found = (Boost(image.exp(), image, VISUAL_GROUPS, self.share),)
        if grounding is None:
            return found
        there = ~grounding.isnan()
        weight, differ = scaled(grounding, there, self.official_quirk)
        factor = torch.where(there & differ, weight + self.beta, 1.0)
        return *found, Boost(factor, text.float(), (), self.share)

    def edit(self, layer: int) -> AttnEdit:
        """The row that decides the next token; the boosts come with each step."""
        return AttnEdit(rows="last")
