"""Retracing: where a layer is unsure, the next one's feed-forward network is given the visual tokens once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vlmattn.methods.base import Method
from vlmattn.methods.checks import Checks


class Retracing(Checks, Method):
    """Mixes something of the visual tokens into the feed-forward network of one layer a token.

    A subclass is a frozen dataclass. In every pass the inputs of `layers` go through the final norm and the head, for
    the rows that choose tokens of the answer; the first layer that is unsure is mixed, at prefill in all rows of the
    prompt by what its last token says.
    """

    kind: ClassVar[str] = "decode"

    def layers(self, num_layers: int) -> Sequence[int]:
        """The decoder layers that may be mixed.

        Raises:
            LayerError: the model has no such layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement layers(num_layers)")

    def unsure(self, logits: Tensor) -> Tensor:
        """`(...)` bool, from the logits `(..., W)` of a layer's input."""
        raise NotImplementedError(f"{type(self).__name__} must implement unsure(logits)")

    def mixed(self, entering: Tensor, leaving: Tensor, memory: Tensor, together: Tensor) -> Tensor:
        """The new output of a feed-forward network.

        Args:
            entering: `(B, M, C)` its normed input.
            leaving: `(B, M, C)` its output.
            memory: `(B, V, C)` the visual tokens as they entered the text model, zeros at padding.
            together: `(B, M)` bool, rows of the prompt, over which means go; every other row stands for itself.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement mixed(entering, leaving, memory, together)")
