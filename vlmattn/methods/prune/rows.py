"""Rows: only the top or the bottom of the image stays, the reference for pruners that prefer a place.

What a method that ranks by attention under rotary positions keeps looks much like the bottom rows (FEATHER, arXiv
2412.13180); a benchmark on which such rows do as well as a method does not ask about the whole image. The tokens are
counted in raster order from the first or the last, so that the last row may be kept in part; in a video in every frame,
in an image of several grids in every grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmattn.methods.base import Pruner, View, param, register


@register("rows", title="Top or bottom rows (baseline)")
@dataclass(frozen=True)
class Rows(Pruner):
    """Keep the visual tokens of the top or the bottom of the image."""

    side: str = param("bottom", "which rows stay: 'top' or 'bottom'")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("side", ("top", "bottom"))

    def score(self, view: View) -> Tensor:
        """`(B, V)` the place in the frame, from the top or from the bottom."""
        height, width, place = view.places()
        share = place.float() / (height * width)
        return -share if self.side == "top" else share
