"""Methods that answer twice: the first answer is only looked at, the second starts from scratch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmattn.edits import Boost
from vlmattn.methods.base import Editor


class Rehearser(Editor):
    """Edits attention by what the model looked at in a short greedy answer of its own.

    `generate()` makes that answer first and throws it away; a bare forward pass has none and is refused.

    Attributes:
        tokens: how many tokens the first answer has, at most; fewer where it ends.
    """

    tokens: int

    share: ClassVar[float] = 0.5
    """Of the heads of a row those count that see most of the image."""

    @property
    def grounds(self) -> bool:
        """Whether `boosts` wants to know what earlier text looked at."""
        return True

    def evidence(self, seen: Tensor, valid: Tensor, present: Tensor) -> Tensor:
        """Factors of the visual tokens.

        Args:
            seen: `(T, L, B, V)` fp32: of every step after the first token and every layer the attention on the visual
                tokens, mean over the heads that count.
            valid: `(T, B)` bool, steps before the sample's answer ended.
            present: `(B, V)` bool, False at padding.

        Returns:
            `(B, V)` fp32, their logarithms; 0 for a token that is left alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement evidence(seen, valid, present)")

    def boosts(self, image: Tensor, grounding: Tensor | None, text: Tensor) -> tuple[Boost, ...]:
        """The edit of one step.

        Args:
            image: `(B, S)` fp32, the evidence of every key; 0 where it is not visual.
            grounding: `(B, S)` fp32, of the text behind the image that went through before: the evidence in its
                attention, mean over the heads that give most, summed over the edited layers; NaN elsewhere. None in the
                prompt.
            text: `(B, S)` bool, all text behind the image.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement boosts(image, grounding, text)")
