"""Methods that let parts of a prompt stand side by side instead of one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmattn.edits import Tags
from vlmattn.methods.base import Editor, LayerView


class Segmenter(Editor):
    """Replaces the attention of all layers: segments of a prompt see each other, and each query orders them anew.

    Segments are the images of a prompt, with the tokens that wrap them, or what `session.segments` says. A prompt with
    fewer than two has nothing to order.
    """

    def layers(self, num_layers: int) -> Sequence[int]:
        """All."""
        return range(num_layers)

    def tags(self, view: LayerView) -> Tags:
        """No edit beside the order."""
        return Tags(view.tag, torch.zeros_like(view.real[:, 0]))

    def positions(self, given: Tensor, segment: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the prompt's tokens before any query orders the segments.

        Args:
            given: `(A, B, N)` long, as the model counts them, on one axis or three.
            segment: `(B, N)` long, -1 for tokens of no segment.
            real: `(B, N)` bool, False at padding.

        Returns:
            `(A, B, N)` long, and `(B, J)` long, how many positions each segment takes; 0 where a sample has fewer.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement positions(given, segment, real)")

    def shifts(self, importance: Tensor, extent: Tensor) -> Tensor:
        """How much further back each segment stands for a query.

        Args:
            importance: `(B, H, N, J)` fp32 of every segment for every head and query; inf: it comes last, -inf: there
                is no such segment.
            extent: `(B, J)` long, how many positions each takes.

        Returns:
            `(B, H, N, J)` long.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement shifts(importance, extent)")
