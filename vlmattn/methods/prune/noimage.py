"""No image: all visual tokens are dropped, so that the model answers from its language prior alone.

The floor of every comparison: an accuracy that survives without the image was never about the image. With
`before_layer=0` the decoder never sees a visual token; before a later layer the text keeps what it has read from the
image until then, which is the floor of a pruner at that layer. The text keeps its positions and the tokens that wrap an
image, so that nothing but the visual tokens, and the newline tokens among them, differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmattn.edits import Keep
from vlmattn.methods.base import Selector, View, param, register


@register("noimage", title="No image (baseline)")
@dataclass(frozen=True)
class NoImage(Selector):
    """Drop all visual tokens."""

    before_layer: int = param(0, "0-indexed decoder layer whose input has no visual token left (0: before the LLM)")

    def disabled(self) -> None:
        """Nothing: it has no strength."""

    @property
    def newlines(self) -> str:
        """None: they would tell the image's proportions."""
        return "none"

    def select(self, view: View) -> Keep:
        """No token."""
        return Keep(torch.zeros_like(view.image, dtype=torch.bool))

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """None of them."""
        return 0
