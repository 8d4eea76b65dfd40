"""VAF (ClearSight): where text meets the image, visual scores are amplified and those of the prompt's head damped.

Idea: modalities are fused in middle layers; there, in all text rows behind the image, the scores of visual keys are
multiplied by beta and those of the keys before the image (the system prompt) by gamma, before the softmax. Yin et al.,
"ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language Models", arXiv
2503.13107.

A factor makes a negative score more negative: visual attention gets sharper rather than more, and a prompt key with a
negative score gains. That is the method.

Deviations from the released code: layers 9 to 14 of 32 are shares of the depth, 0.28 to 0.45, elsewhere (our choice);
of several images all are amplified, what stands before the first is damped, text between them is left alone, and the
rows behind the last are edited (the code knows one image, at fixed places).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from vlmattn.edits import PREFIX, VISUAL, AttnEdit, Tags, per_group
from vlmattn.methods.attend._layers import LayerRange, scaled
from vlmattn.methods.base import LayerView, param, register


@register("vaf", title="ClearSight: Visual Signal Enhancement (Visual Amplification Fusion)", paper="2503.13107")
@dataclass(frozen=True)
class VAF(LayerRange):
    """Multiply the scores of visual tokens, and damp what stands before the image, in middle layers."""

    beta: float = param(1.15, "factor of the scores of visual keys; 1 changes nothing")
    gamma: float = param(0.95, "factor of the scores of the keys before the image; 1 changes nothing")
    first_layer: int | None = param(None, "first decoder layer that is edited; None: the paper's 9 of 32, scaled")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the paper's 14 of 32, scaled")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        for field in ("beta", "gamma"):
            self._number(field, "a number > 0", lambda value: 0 < value < math.inf)

    @property
    def is_noop(self) -> bool:
        """True where both factors are 1."""
        return self.beta == 1 and self.gamma == 1

    def disabled(self) -> VAF:
        """The same edit with both factors 1."""
        return dataclasses.replace(self, beta=1.0, gamma=1.0)

    def tags(self, view: LayerView) -> Tags:
        """What stands before the first image apart from other text."""
        return Tags(torch.where(view.before, PREFIX, view.tag).to(torch.uint8), view.visual.any(1))

    def paper_layers(self, num_layers: int) -> tuple[int, int]:
        """The paper's middle layers, scaled to this depth."""
        return scaled(0.28, num_layers), scaled(0.45, num_layers)

    def edit(self, layer: int) -> AttnEdit:
        """Beta on visual keys, gamma on those before them."""
        return AttnEdit(scale=per_group(1.0, {VISUAL: self.beta, PREFIX: self.gamma}), rows="after")
