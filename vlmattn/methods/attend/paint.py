"""PAINT: visual tokens that show a detail, or stand for the whole image, are raised; the others are left alone.

Idea: PAI raises all visual tokens alike; here the vision tower says which: *local* tokens are the quarter that its
first layer attends to most, *summary* tokens the outliers of the layer that the projector reads (above the Tukey fence
Q3 + 1.5 (Q3 - Q1)). In the row that decides the next token a local score s becomes s + alpha * |s|, a summary score s +
beta * |s|; a token that is both is a summary token. Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context
Hallucination of Large Vision-Language Model", arXiv 2501.12206.

Deviations from the released code: `alpha` is 0.5 by default (the code has 0.7, where captions collapse into repetition
by the paper's own ablation); the spatial tokens are left out (never used by the code, and constant up to rounding);
without the text-only branch, which is a method of its own (and beside which the code leaves out the prompt's last row:
`official_quirk=True`). Towers without CLS rank by the attention received, in their first and last layer that sees a
whole image. Tokens are chosen on the whole image, or on each of several pictures of it, also where some were pruned
before; newline tokens never. `head_limit` is ours: the paper's abstract has strengths by the visual sensitivity of
heads, the code has none; above 0, a head's strength is multiplied by its visual mass over the mean of all heads, at
most by this. Tokens of a later turn count as generated ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import LOCAL, SUMMARY, AttnEdit, Keep, Tags, per_group
from vlmattn.methods.attend._layers import LayerRange
from vlmattn.methods.base import LayerView, Look, param, register


def outliers(weight: Tensor, image: Tensor) -> Tensor:
    """`(B, V)` bool, tokens above Q3 + 1.5 (Q3 - Q1) of their image (quartiles interpolated linearly).

    Args:
        weight: `(B, V)` float.
        image: `(B, V)` long, -1 at padding.
    """
    found = torch.zeros_like(image, dtype=torch.bool)
    for number in range(int(image.max()) + 1):
        own = weight.float().masked_fill(image != number, torch.nan)
        first, third = own.nanquantile(torch.tensor([0.25, 0.75], device=own.device), 1, keepdim=True)
        found |= own > third + 1.5 * (third - first)
    return found


def local(weight: Tensor, image: Tensor, ratio: float) -> Tensor:
    """`(B, V)` bool, of every image the `int(ratio * tokens)` best by `weight` `(B, V)`; `image` as in `outliers`."""
    images = range(max(int(image.max()) + 1, 1))
    counts = torch.stack([(image == number).sum(1) for number in images], 1)
    return Keep.top(weight, image, (counts.double() * ratio).long()).mask


@register("paint", title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination", paper="2501.12206")
@dataclass(frozen=True)
class PAINT(LayerRange):
    """Raise the scores of local and of summary visual tokens in the row that decides the next token."""

    alpha: float = param(0.5, "a local score s becomes s + alpha * |s|; the released code has 0.7")
    beta: float = param(0.3, "a summary score s becomes s + beta * |s|")
    local_ratio: float = param(0.25, "share of an image's tokens that is local")
    head_limit: float = param(
        0.0, "above 0 heads differ: strength times visual mass over its mean, at most this (ours)"
    )
    first_layer: int | None = param(2, "first decoder layer that is edited")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the last of the model")
    official_quirk: bool = param(False, "leave out the prompt's last row, as the code does beside its text-only branch")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        for field in ("alpha", "beta", "head_limit"):
            self._number(field, "a number >= 0", lambda value: 0 <= value < math.inf)
        self._flag("official_quirk")
        self._number("local_ratio", "a share in [0, 1]", lambda value: 0 <= value <= 1)

    @property
    def is_noop(self) -> bool:
        """True where both strengths are 0."""
        return self.alpha == 0 and self.beta == 0

    def disabled(self) -> PAINT:
        """The same edit with both strengths 0."""
        return dataclasses.replace(self, alpha=0.0, beta=0.0)

    @property
    def looks(self) -> Mapping[str, Look]:
        """The CLS rows of the first layer and of the one that the projector reads."""
        return {"first": Look("attention", 0), "last": Look("attention")}

    def tags(self, view: LayerView) -> Tags:
        """Local and summary tokens apart from other visual ones."""
        assert view.grid is not None and view.token is not None
        detail = local(view.vision["first"].sum(-1), view.grid, self.local_ratio)
        whole = outliers(view.vision["last"].sum(-1), view.grid)
        there, place = view.token >= 0, view.token.clamp_min(0)
        tag = torch.where(there & detail.gather(1, place), LOCAL, view.tag)
        tag = torch.where(there & whole.gather(1, place), SUMMARY, tag)
        return Tags(tag.to(torch.uint8), view.visual.any(1))

    def edit(self, layer: int) -> AttnEdit:
        """Alpha on local keys, beta on summary keys."""
        return AttnEdit(
            logit_strength=per_group(0.0, {LOCAL: self.alpha, SUMMARY: self.beta}),
            head_limit=self.head_limit,
            rows="generated" if self.official_quirk else "last",
        )
