"""VisionZip: the tokens that the vision tower's CLS token looks at, and averages of the rest.

Idea: most of the tower's attention falls on a few patches; keep these *dominant* tokens, and merge the others by the
similarity of their keys into some *contextual* ones, so that little is lost. No text is needed, so a choice holds for
every question. Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv
2412.04467.

In the layer whose output the projector reads: the dominant tokens D are the best by the CLS row, mean over heads; of
the rest R, in order, every step-th is a target, step = max(1, |R| // contextual); every other token of R goes to the
target whose key (mean over heads) has the highest cosine; a target becomes `x_target + mean(x_members)` before the
projector, a sum whose norm is about twice that of a token.

Deviations from the released code: one attention row of one layer is computed instead of all attention of all layers.
The number of tokens is `keep`, of which `contextual` is the share of the merged ones (the code's 54 + 10, 108 + 20 and
162 + 30 are `keep=64`, 128 and 192). The code keeps the CLS token as one of the dominant (`keep_cls=True`; it takes
the first free slot, and needs a tower that has one); by default one more patch stays instead. Tokens keep their order
and positions, a contextual token those of its target; the code's CLS, dominant, contextual without gaps is
`order=code, positions=compact`. Towers without CLS rank by the attention received; where the projector joins patches,
its output is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import Look, Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, cosine, ranks, rewritten


@register("visionzip", title="VisionZip: Longer is Better but Not Necessary", paper="2412.04467")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keep the tokens that CLS attends to most, and merge the others into a few."""

    entry_only: ClassVar[bool] = True

    keep: float | int = param(64, "share (float in (0, 1]) or number (int) of the visual tokens that stays")
    contextual: float = param(0.15625, "share of `keep` that merged tokens take, 10 of 64")
    keep_cls: bool = param(False, "whether the CLS token is one of the tokens that stay")
    order: str = param("raster", "'raster': a merged token stands at its target; 'code': CLS, dominant, merged")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("order", ("raster", "code"))
        self._number("contextual", "a share in [0, 1)", lambda share: 0 <= share < 1)
        self._flag("keep_cls")

    @property
    def merges(self) -> bool:
        """True."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, and the way of merged features into them."""
        return frozenset({"layer_input", "projector"})

    @property
    def requires(self) -> frozenset[str]:
        """A CLS token, to keep it."""
        return super().requires | ({"cls"} if self.keep_cls else set())

    @property
    def looks(self) -> Mapping[str, Look]:
        """The feature layer's CLS row and keys, and the features."""
        names = ("attention", "keys", "features", *(("cls",) if self.keep_cls else ()))
        return {name: Look(name) for name in names}

    def select(self, view: View) -> Keep:
        """Dominant tokens, and targets that the others are merged into."""
        assert view.hidden is not None and view.project is not None
        pools = Pools.of(view, self.budget_scope)
        there, counts = pools.present, self.groups(view)[1].flatten()
        merged = torch.floor(counts * self.contextual + 0.5).long().clamp_max(counts - int(self.keep_cls))
        dominant = ranks(pools.split(view.vision["attention"]).mean(-1), there)
        dominant = dominant < (counts - merged - int(self.keep_cls))[:, None]
        features, keys = pools.split(view.vision["features"]), pools.split(view.vision["keys"]).mean(-2)
        values, target, changed = merge(features, keys, there & ~dominant, merged)
        rows = rewritten(pools.split(view.hidden), values, changed, view.project)
        kept, place = dominant | target, 1 + target.long()
        if self.keep_cls:
            slot = (there & ~kept).long().argmax(1, keepdim=True)
            at = torch.zeros_like(kept).scatter(1, slot, counts[:, None] > 0)
            rows = rewritten(rows, pools.split(view.vision["cls"]), at, view.project)
            kept, place = kept | at, place.masked_fill(at, 0)
        return pools.keep(kept, rows, None if self.order == "raster" else place)


def merge(features: Tensor, keys: Tensor, rest: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the `rest` of every pool into evenly spread targets among it.

    Args:
        features: `(P, W, C)`.
        keys: `(P, W, D)`; a token goes to the target with the highest cosine.
        rest: `(P, W)` bool, the tokens to merge.
        targets: `(P,)` long, how many targets, at most.

    Returns:
        The features with those of the targets replaced, which tokens are targets, and which of them have members.
    """
    place = rest.long().cumsum(1) - 1
    step = (rest.sum(1) // targets.clamp_min(1)).clamp_min(1)[:, None]
    target = rest & (place % step == 0) & (place // step < targets[:, None])
    member = rest & ~target & target.any(1, keepdim=True)
    nearest = cosine(keys).masked_fill(~target[:, None], -torch.inf).argmax(2)
    size = torch.zeros_like(place).scatter_add(1, nearest, member.long())
    x = features.float()
    total = torch.zeros_like(x).scatter_add(1, nearest[..., None].expand_as(x), x * member[..., None])
    changed = target & (size > 0)
    return torch.where(changed[..., None], x + total / size.clamp_min(1)[..., None], x).to(features), target, changed
