"""DART: a few pivots stay, and with each the tokens that are least like it.

Idea: what can be spared is what is there twice, not what is little attended to. Pick a few pivot tokens by the size of
their keys, and keep the tokens with the least similarity to them. Wen et al., "Stop Looking for Important Tokens in
Multimodal Language Models: Duplication Matters More", arXiv 2502.11494.

1. Pivots: the `image_pivots` visual tokens and the `text_pivots` text tokens behind the image with the largest L1 norm
   of the rotated key in the layer before. 2. x: the layer input behind the model's final norm. 3. For every pivot in
   turn, take the k tokens of the rest with the lowest cosine to it, k = (n - image pivots) // pivots. The visual pivots
   and all that was taken stay.

Deviations from the released code: the rest of n is filled with the tokens least like the last pivot, so that `keep`
holds exactly; with `exact_budget=False` k = int(V * keep / pivots) as in that part of the code which takes a ratio, and
nothing is filled up. Pivots take turns by falling norm, visual ones first (the code's order is that of a Python set);
what runs out is clamped; without text behind the image only visual pivots count; every image of every sample is
treated by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, ranks


def least_like(x: Tensor, pool: Tensor, pivots: Tensor, valid: Tensor, share: Tensor) -> Tensor:
    """For every pivot in turn take the tokens of the pool with the lowest cosine to it; ties: the lower index.

    Args:
        x: `(P, W, C)`.
        pool: `(P, W)` bool, what may be taken.
        pivots: `(P, n, C)`, in their order.
        valid: `(P, n)` bool, which are pivots at all.
        share: `(P, n)` long, how many each takes; those that are left if these are fewer.

    Returns:
        `(P, W)` bool, what was taken.
    """
    unit, centre = (torch.nn.functional.normalize(y.float(), dim=-1) for y in (x, pivots))
    cosine = centre @ unit.mT
    left = pool
    for turn in range(pivots.shape[1]):
        best = ranks(-cosine[:, turn], left) < torch.where(valid[:, turn], share[:, turn], 0)[:, None]
        left = left & ~best
    return pool & ~left


@register("dart", title="Stop Looking for Important Tokens: Duplication Matters More", paper="2502.11494")
@dataclass(frozen=True)
class DART(Pruner):
    """Keep a few pivots and the visual tokens that are least like them."""

    paper_layers: ClassVar[tuple[int, ...]] = (2,)
    min_layer: ClassVar[int] = 1

    keep: float | int = param(0.222, "share (float in (0, 1]) or number (int) of the arriving visual tokens that stays")
    image_pivots: int = param(4, "visual tokens that are pivots")
    text_pivots: int = param(4, "text tokens behind the image that are pivots")
    norm: str | None = param("final", "norm before the cosine: 'final' of the model, that of the 'layer', or None")
    exact_budget: bool = param(True, "whether exactly `keep` stay; False: as many as the released code keeps")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        for name, least in (("image_pivots", 1), ("text_pivots", 0)):
            self._count(name, least)
        if self.norm is not None:
            self._one_of("norm", ("final", "layer"))
        self._flag("exact_budget")

    @property
    def needs(self) -> frozenset[str]:
        """Keys and rows of image and text, and the norms."""
        return frozenset({"layer_input", "layer_keys", "text_rows", "norms"})

    def select(self, view: View) -> Keep:
        """Pivots, and what they take."""
        assert view.hidden is not None and view.layer_keys is not None and view.text is not None
        pools = Pools.of(view, self.budget_scope)
        there, counts = pools.present, self.groups(view)[1].flatten()
        norm = view.norms[self.norm] if self.norm is not None else torch.nn.Identity()
        x = norm(pools.split(view.hidden))
        size = pools.split(_size(view.layer_keys))
        order = ranks(size, there)
        own = order.argsort(1)[:, : self.image_pivots]
        first = torch.arange(own.shape[1], device=own.device) < counts.clamp_max(self.image_pivots)[:, None]
        words, spoken = self._text_pivots(view, norm, len(x) // len(view.image))
        pivots = torch.cat([x.gather(1, own[..., None].expand(-1, -1, x.shape[2])), words], 1)
        valid = torch.cat([first, spoken], 1)
        kept = (order < first.sum(1, keepdim=True)) & there
        each = self._share(counts, there.sum(1), first.sum(1), valid.sum(1))
        share = each[:, None].expand_as(valid)
        kept = kept | least_like(x, there & ~kept, pivots, valid, share)
        if self.exact_budget:
            final = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
            rest = (counts - kept.sum(1))[:, None].expand_as(valid)
            kept = kept | least_like(x, there & ~kept, pivots, final, rest)
        return pools.keep(kept)

    def _text_pivots(self, view: View, norm: Callable[[Tensor], Tensor], repeats: int) -> tuple[Tensor, Tensor]:
        """`(P, n, C)` the text pivots of every pool by falling key size, and `(P, n)` bool where there are fewer."""
        text = view.text
        assert text is not None and text.layer_keys is not None
        order = ranks(_size(text.layer_keys), text.after).argsort(1)[:, : self.text_pivots]
        rows = norm(text.hidden.gather(1, order[..., None].expand(-1, -1, text.hidden.shape[2])))
        return rows.repeat_interleave(repeats, 0), text.after.gather(1, order).repeat_interleave(repeats, 0)

    def _share(self, counts: Tensor, present: Tensor, own: Tensor, pivots: Tensor) -> Tensor:
        """`(P,)` how many tokens each pivot takes."""
        if self.exact_budget:
            return torch.div(counts - own, pivots, rounding_mode="floor").clamp_min(0)
        wanted = present * self.keep if isinstance(self.keep, float) else present.clamp_max(self.keep)
        return torch.floor(wanted / pivots + 1e-9).long().minimum((present - own) // pivots)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """The budget; with `exact_budget=False` what the code keeps if there is text for all pivots."""
        if self.exact_budget:
            return super().left(visual, grid, stage)
        own = min(self.image_pivots, self.quota(visual, visual, stage))
        pivots = own + self.text_pivots
        wanted = visual * self.keep if isinstance(self.keep, float) else min(self.keep, visual)
        return own + pivots * min(int(wanted / pivots + 1e-9), (visual - own) // pivots)


def _size(keys: Tensor) -> Tensor:
    """`(B, n)` L1 norm of keys `(B, n, H, D)`."""
    return keys.float().abs().sum((2, 3))
