"""HGAI: heads are drawn to the visual tokens that other heads look at.

Idea: in middle layers, where the image is read, heads that look at inconsistent places hallucinate; in the row that
decides the next token every visual key j gets the bonus alpha * mean over heads of |s_hj| on its score, the same for
all heads. Jiang et al., "Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and
Mitigating Object Hallucinations via Attention Lens", arXiv 2411.16724.

The bonus is never negative, so the whole image gains attention in every head, and with thousands of visual tokens it
saturates: take a smaller alpha.

Deviations from the released code: layers 5 to 17 of 32 are shares of the depth, 0.16 to 0.56, elsewhere (our choice);
each sample has its own visual tokens. Tokens of a later turn count as generated ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from vlmattn.edits import VISUAL, AttnEdit, per_group
from vlmattn.methods.attend._layers import LayerRange, scaled
from vlmattn.methods.base import param, register


@register("hgai", title="Devils in Middle Layers (Heads-Guided Attention Intervention)", paper="2411.16724")
@dataclass(frozen=True)
class HGAI(LayerRange):
    """Raise the scores of visual tokens by what all heads together look at."""

    alpha: float = param(0.5, "factor of the mean over heads of |score| that is added; 0 changes nothing")
    first_layer: int | None = param(None, "first decoder layer that is edited; None: the paper's 5 of 32, scaled")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the paper's 17 of 32, scaled")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._number("alpha", "a number >= 0", lambda value: 0 <= value < math.inf)

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0."""
        return self.alpha == 0

    def disabled(self) -> HGAI:
        """The same edit with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    def paper_layers(self, num_layers: int) -> tuple[int, int]:
        """The paper's middle layers, scaled to this depth."""
        return scaled(0.16, num_layers), scaled(0.56, num_layers) - 1

    def edit(self, layer: int) -> AttnEdit:
        """Alpha on visual keys, shared by the heads."""
        return AttnEdit(logit_strength=per_group(0.0, {VISUAL: self.alpha}), across_heads=True, rows="last")
