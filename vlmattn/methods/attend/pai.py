"""PAI: the scores of visual tokens are raised where the next word is decided.

Idea: language models go on with their own text and look too little at the image; in the row that decides the next
token, the score s of every visual key becomes s + alpha * |s| before the softmax. Liu et al., "Paying More Attention to
Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv 2407.21771.

This is the attention part; the text-only branch of the paper is a method of its own and composes with it. A negative
score grows too (alpha below 1) or changes its sign (above), and the other visual keys grow with it, so that a key may
still lose attention.

Deviations from the released code: the boost and the text-only branch are independent (in the code the boost leaves out
the prompt's last row while the branch is on: `official_quirk=True`); each sample has its own visual tokens; padding is
never boosted. `alpha` is the paper's for 576 visual tokens; it has 0.6 and 0.2 for other models, and as all visual
scores are raised, more tokens want a smaller one. Tokens of a later turn count as generated ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from vlmattn.edits import VISUAL, AttnEdit, per_group
from vlmattn.methods.attend._layers import LayerRange
from vlmattn.methods.base import param, register


@register("pai", title="Paying More Attention to Image", paper="2407.21771")
@dataclass(frozen=True)
class PAI(LayerRange):
    """Raise the scores of all visual tokens in the row that decides the next token."""

    alpha: float = param(0.5, "a visual score s becomes s + alpha * |s|; 0 changes nothing")
    first_layer: int | None = param(2, "first decoder layer that is edited")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the last of the model")
    official_quirk: bool = param(False, "leave out the prompt's last row, as the code does beside its text-only branch")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._number("alpha", "a number >= 0", lambda value: 0 <= value < math.inf)
        self._flag("official_quirk")

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0."""
        return self.alpha == 0

    def disabled(self) -> PAI:
        """The same edit with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    def edit(self, layer: int) -> AttnEdit:
        """Alpha on visual keys."""
        return AttnEdit(
            logit_strength=per_group(0.0, {VISUAL: self.alpha}), rows="generated" if self.official_quirk else "last"
        )
