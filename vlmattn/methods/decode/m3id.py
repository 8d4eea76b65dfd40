"""M3ID: the longer the answer, the more the image is weighed against the text alone.

Idea: what conditions the model on the image fades as the answer grows; add the difference to the text-only prediction,
with a weight that grows from token to token. Favero et al., "Multi-Modal Hallucination Control by Visual Information
Grounding", arXiv 2403.14003.

Deviations: no official code is known; this follows the re-implementation inside the code of AvisC (arXiv 2405.17820).
There the weight exp(lam * t) - 1 grows without bound; here `max_weight` caps it (inf: as there). lam = 0 leaves the
model alone, the cutoff included. The text-only prompt also loses the tokens that wrap an image.

Cost: a prefill of the text alone and its keys and values; both branches decode in one batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Branch, Calibration, Step

LARGEST = 1e30
"""Of all weights: infinite ones would make no number of equal probabilities."""


@register("m3id", title="Multi-Modal Hallucination Control by Visual Information Grounding", paper="2403.14003")
@dataclass(frozen=True)
class M3ID(Calibration):
    """Add what the image changes in the prediction, more so with every token of the answer."""

    lam: float = param(0.02, "how fast the weight grows: exp(lam * t) - 1 at token t; 0 changes nothing")
    beta: float = param(0.1, "tokens below this share of the largest probability cannot be chosen; 0: all can")
    max_weight: float = param(2.0, "cap of the weight, reached at token 55 by default; inf: none")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("lam", "a finite number >= 0", lambda value: 0 <= value < math.inf)
        self._number("max_weight", "a number > 0, or inf", lambda value: value > 0)
        self._check_beta()

    @property
    def is_noop(self) -> bool:
        """True for lam = 0."""
        return self.lam == 0

    def disabled(self) -> M3ID:
        """The same with lam = 0."""
        return dataclasses.replace(self, lam=0.0)

    @property
    def branch(self) -> Branch:
        """The text alone."""
        return Branch(text_only=True)

    def combine(self, step: Step) -> Tensor:
        """`lc + w * (lc - lu)` of the log-probabilities with the image and without."""
        assert step.other is not None
        with_image, without = step.logits.log_softmax(-1), step.other.log_softmax(-1)
        weight = (self.lam * step.number.float()).expm1().clamp_max(min(self.max_weight, LARGEST))
        return with_image + weight[:, None] * (with_image - without)
