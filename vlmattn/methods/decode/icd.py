"""ICD: what the model says under a disturbing instruction as well is subtracted.

Idea: told to be a confused observer, a model leans on its priors; contrast its logits with those of the plain prompt at
every token. Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive
Decoding", arXiv 2403.18715.

Deviations: the released code replaces the system message of the conversation; not every chat template has a slot for
one, so that the disturbance stands in the user's text, before the image (`where=after`: behind it, as in the code of
SID). Its wording is ours. alpha = 0 leaves the model alone, the cutoff included. The image goes through the vision
tower once.

Cost: a second prefill, longer by the disturbance, and twice the keys and values; both branches decode in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import PLACES, Branch, Contrast, instruction

DISTURBANCE = "You are a confused object detector. You only have a fuzzy overview of the image and mix things up. "


@register(
    "icd",
    title="Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding",
    paper="2403.18715",
)
@dataclass(frozen=True)
class ICD(Contrast):
    """Subtract the logits that the model has under a disturbing instruction."""

    disturbance: str | Sequence[int] = param(DISTURBANCE, "the instruction: a text (needs the processor), or token ids")
    where: str = param("before", "'before' the image or 'after' it")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        object.__setattr__(self, "disturbance", instruction(self, self.disturbance))
        self._one_of("where", PLACES)

    @property
    def branch(self) -> Branch:
        """The prompt with the disturbance beside its image."""
        return Branch(insert=self.disturbance, where=self.where)
