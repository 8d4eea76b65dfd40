"""Image downsampling: the picture is made smaller before the processor sees it, so that fewer tokens come of it.

The strongest baseline in cost: the vision tower sees less, too. VTC-Bench (arXiv 2510.07143) found it ahead of many
pruners on models that take images at their own resolution; where the processor brings every image to one size it
changes no token, and is refused. A picture of h x w tokens is brought to gh x gw tokens with gh = round(sqrt(n * h /
w)) and gw = floor(n / gh), bicubic, n being `keep` of its tokens (they shrink the sides by whole factors; ours ends at
whole tokens, so that the budget is exact and the aspect changes by less than a token).

It acts on images, which a plain `model.generate(**inputs)` no longer has: `session.answer(image, text)`, or your own
calls inside `with session.images(pictures) as smaller`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from vlmattn import budget
from vlmattn.methods.base import Resizer, param, register
from vlmattn.spans import squarest


def resize_to_tokens(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of at most `tokens` tokens for a picture of `height` x `width`, about as wide for its height."""
    rows = min(max(round(math.sqrt(tokens * height / width)), 1), height, tokens)
    return rows, min(max(tokens // rows, 1), width)


@register("downsample", title="Image downsampling (baseline)", paper="2510.07143")
@dataclass(frozen=True)
class Downsample(Resizer):
    """Make the image smaller before the processor sees it."""

    keep: float | int = param(0.5, "share (float in (0, 1]) or number (int) of its tokens that the image is left with")

    def __post_init__(self) -> None:
        """Validate the field.

        Raises:
            BudgetError: it is no budget.
        """
        budget.check(self.keep, "downsample.keep")

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def disabled(self) -> Downsample:
        """The same with `keep=1.0`."""
        return dataclasses.replace(self, keep=1.0)

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """The budget in the shape of the picture."""
        return resize_to_tokens(height, width, budget.count(height * width, self.keep))

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """The tokens of the smaller picture, in all layers."""
        if not visual or self.is_noop:
            return [visual] * num_layers
        frames, height, width = squarest(visual) if grid is None else grid
        return [frames * math.prod(self.cells(height, width))] * num_layers
