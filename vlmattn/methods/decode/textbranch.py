"""The text-only branch of PAI: what the text alone predicts counts less.

Idea: a model that says the same without the image is carried by its text; move its log-probabilities away from those of
the text alone, as in classifier-free guidance. Liu, Zheng and Chen, "Paying More Attention to Image", arXiv 2407.21771,
equation 6; the attention part is a method of its own.

Deviations: the released code leaves the first token's attention alone where both parts are on, and does not reorder the
text branch with its beams; here the parts are independent and beams are right. gamma = 1 leaves the model alone, the
cutoff included. The text-only prompt also loses the tokens that wrap an image.

Cost: a prefill of the text alone and its keys and values; both branches decode in one batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Branch, Calibration, Step


@register(
    "textbranch",
    title="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs (text branch)",
    paper="2407.21771",
)
@dataclass(frozen=True)
class TextBranch(Calibration):
    """Move the prediction away from that of the text alone."""

    gamma: float = param(1.1, "how far: gamma * lc - (gamma - 1) * lu; 1 changes nothing")
    beta: float = param(0.1, "tokens below this share of the largest probability cannot be chosen; 0: all can")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("gamma", "a finite number >= 1", lambda value: 1 <= value < math.inf)
        self._check_beta()

    @property
    def is_noop(self) -> bool:
        """True for gamma = 1."""
        return self.gamma == 1

    def disabled(self) -> TextBranch:
        """The same with gamma = 1."""
        return dataclasses.replace(self, gamma=1.0)

    @property
    def branch(self) -> Branch:
        """The text alone."""
        return Branch(text_only=True)

    def combine(self, step: Step) -> Tensor:
        """`lu + gamma * (lc - lu)` of the log-probabilities with the image and without."""
        assert step.other is not None
        with_image, without = step.logits.log_softmax(-1), step.other.log_softmax(-1)
        return without + self.gamma * (with_image - without)
