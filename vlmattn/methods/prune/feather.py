"""FEATHER: two stages, ranked without rotary positions, the first with a uniform grid beside the ranking.

Idea: under rotary positions the last prompt token attends to what stands near it, so that ranking by attention in early
layers keeps the bottom of the image. Leave the rotation out of the criterion, add a uniform grid to the early choice,
and choose harder where attention has become reliable. Endo et al., "Feather the Throttle: Revisiting Visual Token
Pruning for Vision-Language Model Acceleration", arXiv 2412.13180.

Scores, in the layer before each stage: `mean over heads of softmax over visual keys (q_last . k_j / sqrt(d))`, without
rotation. First stage: the best int(V * keep) and every token in a row and a column divisible by `stride`. Second stage:
the best int(V1 * keep ** 2) of the V1 survivors; the grid is not protected.

Deviations from the released code: every sample of a batch is ranked by itself; the grid is the image's own, not a
square, and its stride holds for each frame of a video and for each grid of an image in tiles; at least one token stays
(the code's `int` may leave none).
Ablations of the paper: `stride=None` with one layer is FastV without rotary positions, `rotary=True` with rotary ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Attention, Pruner, View, param, register
from vlmattn.spans import squarest


@register("feather", title="Feather the Throttle: Revisiting Visual Token Pruning", paper="2412.13180")
@dataclass(frozen=True)
class Feather(Pruner):
    """Keep what attention without rotary positions ranks best: with a uniform grid early, alone later."""

    paper_layers: ClassVar[tuple[int, ...]] = (8, 16)
    any_stages: ClassVar[bool] = True
    min_layer: ClassVar[int] = 1

    keep: float | int = param(0.3, "share (or number) of the tokens that attention keeps first; later its square")
    stride: int | None = param(3, "at the first stage the tokens of every stride-th row and column stay; None: no grid")
    rotary: bool = param(False, "whether the criterion sees rotary positions")
    softmax_over: str = param("visual", "keys of the criterion's softmax: 'visual' (code) or 'all'")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("softmax_over", ("visual", "all"))
        if self.stride is not None and (type(self.stride) is not int or self.stride < 1):
            raise SpecError(f"feather.stride={self.stride!r}: expected an int >= 1, or None for no grid")
        self._flag("rotary")

    @property
    def adaptive(self) -> bool:
        """How many tokens the grid adds depends on the ranking."""
        return self.stride is not None

    @property
    def attention(self) -> Attention:
        """Of the last prompt token, in the layer before."""
        return Attention("last", rotary=self.rotary, over=self.softmax_over)

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """`int(V * keep)`, at later stages `int(V * keep ** 2)`, at least 1."""
        share = self.keep if isinstance(self.keep, float) else min(self.keep / length, 1.0)
        return max(int(arriving * share ** (1 if stage == 0 else 2) + 1e-9), 1)

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention received, mean over heads."""
        assert view.scores is not None
        return view.scores

    def select(self, view: View) -> Keep:
        """The best ranked, and at the first stage the grid."""
        best = super().select(view)
        return best if view.stage or self.stride is None else Keep(best.mask | self._grid(view, self.stride))

    def _grid(self, view: View, stride: int) -> Tensor:
        """`(B, V)` bool, tokens whose row and column in their frame are divisible by the stride."""
        if not all(span.rasters for spans in view.spans for span in spans):
            raise CallError(f"{self}: the grid of an image is not known: use stride=None")
        _, width, place = view.places()
        return (place // width % stride == 0) & (place % width % stride == 0)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """After the first stage the ranked ones and, where ranking and place have nothing in common, the grid's."""
        ranked = self.quota(visual, visual, 0)
        if self.stride is not None:
            frames, height, width = squarest(visual) if grid is None else grid
            uniform = frames * math.ceil(height / self.stride) * math.ceil(width / self.stride)
            ranked = min(math.floor(ranked + uniform - ranked * uniform / visual + 0.5), visual)
        for later in range(1, stage + 1):
            ranked = self.quota(ranked, visual, later)
        return ranked
