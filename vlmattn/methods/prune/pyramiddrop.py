"""PyramidDrop: the image becomes smaller by stages as the layers get deeper.

Idea: all visual tokens matter in shallow layers and fewer and fewer in deep ones, so after each quarter of the model
keep a fixed part of them, ranked by how the last instruction token attends. Xing et al., "PyramidDrop: Accelerating
Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv 2410.17247.

Before the layer of stage s (counting from 1) the queries and keys of that layer itself are computed on what arrives;
`mean over heads of softmax over all keys` ranks the visual tokens, and int(V * keep ** s) of the V tokens of the image
stay; `ratios` gives other shares.

Deviations from the released code: rows of a batch may be padded and ranked by their own last token; grouped key heads
are served; at least one token stays; positions are the original ones (`positions=compact` renumbers every stage as the
code does); the share holds for every image unless `budget_scope="sample"`. The last prompt token counts as the last
instruction token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn import budget
from vlmattn.errors import SpecError
from vlmattn.methods.base import Attention, Pruner, View, param, register


@register("pyramiddrop", title="PyramidDrop: Pyramid Visual Redundancy Reduction", paper="2410.17247")
@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Keep at each stage a smaller part of the visual tokens, ranked by the last token's attention in that layer."""

    paper_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)
    any_stages: ClassVar[bool] = True
    min_layer: ClassVar[int] = 1
    instead_of_keep: ClassVar[str] = "ratios"

    keep: float | int = param(0.5, "share (or number) of the visual tokens after the first stage; later its powers")
    ratios: tuple[float, ...] | None = param(None, "shares of the image's tokens after each stage, in place of `keep`")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.ratios is None:
            return
        if not isinstance(self.ratios, list | tuple) or not all(isinstance(ratio, float) for ratio in self.ratios):
            raise SpecError(f"pyramiddrop.ratios={self.ratios!r}: expected shares such as [0.5, 0.25, 0.125], or None")
        object.__setattr__(self, "ratios", tuple(self.ratios))
        for ratio in self.ratios:
            budget.check(ratio, "pyramiddrop.ratios")
        given = self.before_layer
        wanted = len(self.paper_layers) if given is None else 1 if isinstance(given, int) else len(given)
        if len(self.ratios) != wanted or list(self.ratios) != sorted(self.ratios, reverse=True):
            raise SpecError(f"pyramiddrop.ratios={self.ratios!r}: expected {wanted} shares, one a stage, none growing")

    @property
    def is_noop(self) -> bool:
        """True where every stage keeps everything."""
        return super().is_noop if self.ratios is None else set(self.ratios) == {1.0}

    def disabled(self) -> PyramidDrop:
        """The same stages with `keep=1.0`."""
        return PyramidDrop(keep=1.0, before_layer=self.before_layer)

    @property
    def attention(self) -> Attention:
        """Of the last prompt token, in the layer that is about to run."""
        return Attention("last", layer="upcoming")

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """`int(V * share)` of the image's V tokens, at least 1."""
        if self.ratios is None:
            share = self.keep if isinstance(self.keep, float) else min(self.keep / length, 1.0)
            share **= stage + 1
        else:
            share = self.ratios[stage]
        return min(max(int(length * share + 1e-9), 1), arriving)

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention received, mean over heads."""
        assert view.scores is not None
        return view.scores
