"""Small torch functions that several pruners share, each vectorised over pools.

A pool is what one choice is made from: the visual tokens of one image, or of one prompt. Everything here takes pools
of `W` slots, padded at the end, with `present` `(P, W)` bool. The greedy searches are sequential by nature: one step a
pick, for all pools at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.base import View


@dataclass(frozen=True)
class Pools:
    """The visual tokens of a view, one row a pool.

    Attributes:
        view: whose tokens they are.
        slot: `(B, P / B, W)` long, the token in the view's `V`; 0 where there is none.
        present: `(P, W)` bool.
    """

    view: View
    slot: Tensor
    present: Tensor

    @classmethod
    def of(cls, view: View, scope: str = "image") -> Pools:
        """One pool an image, or with `scope="sample"` one a prompt; the view's tokens stand image by image."""
        counts = view.counts.sum(1, keepdim=True) if scope == "sample" else view.counts
        column = torch.arange(int(counts.max()), device=counts.device)
        present = column < counts[..., None]
        start = counts.cumsum(1) - counts
        return cls(view, torch.where(present, start[..., None] + column, 0), present.flatten(0, 1))

    @property
    def width(self) -> int:
        """Slots of a pool, `W`."""
        return self.present.shape[1]

    @property
    def sizes(self) -> Tensor:
        """`(P,)` long, tokens of each pool."""
        return self.present.sum(1)

    def split(self, x: Tensor) -> Tensor:
        """`(B, V, ...)` to `(P, W, ...)`; what stands in empty slots means nothing."""
        x = x.to(self.present.device)  # what the tower says may lie on another one
        index = _wide(self.slot.flatten(1), x)
        return x.gather(1, index).view(*self.present.shape, *x.shape[2:])

    def keep(self, kept: Tensor, rows: Tensor | None = None, place: Tensor | None = None) -> Keep:
        """The decision for the view: tokens `(P, W)` bool that stay, and new rows `(P, W, C)` of the layer input.

        With `place` `(P, W)` these stand in its order, see `arranged`.
        """
        mask = self._join(kept & self.present, torch.zeros_like(self.view.image, dtype=torch.bool))
        if rows is None:
            return Keep(mask)
        assert self.view.hidden is not None
        if place is None:
            return Keep(mask, self._join(rows, self.view.hidden))
        values = self._join(arranged(rows, kept, place), self.view.hidden)
        return Keep(mask, values, lambda x: self._join(arranged(self.split(x), kept, place), x))

    def _join(self, x: Tensor, like: Tensor) -> Tensor:
        """`(P, W, ...)` to `(B, V, ...)`, with the rows of `like` where no pool has a token."""
        # a column behind the last takes what stands in empty slots
        target = torch.where(self.present.view_as(self.slot), self.slot, like.shape[1]).flatten(1)
        padded = torch.cat([like, like[:, :1]], 1)
        values = x.to(like).reshape(len(like), -1, *like.shape[2:])
        return padded.scatter(1, _wide(target, values), values)[:, :-1]


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """`(B, n)` indices for every inner number of `like` `(B, V, ...)`."""
    inner = like.shape[2:]
    return index.to(like.device).view(*index.shape, *[1] * len(inner)).expand(-1, -1, *inner)


def cosine(x: Tensor) -> Tensor:
    """`(P, W, C)` to cosines `(P, W, W)`, fp32; a row of zeros has the cosine 0 with everything."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return unit @ unit.mT


def ranks(score: Tensor, present: Tensor) -> Tensor:
    """`(P, W)` long, the place of every token in the order of falling score, 0 the best; ties: the lower index first.

    Empty slots come last.
    """
    order = torch.argsort(score.masked_fill(~present, -torch.inf), dim=1, descending=True, stable=True)
    # a token may itself score -inf: the empty ones still go behind it
    order = order.gather(1, torch.argsort((~present.gather(1, order)).long(), dim=1, stable=True))
    return torch.argsort(order, dim=1)


def rewritten(hidden: Tensor, features: Tensor, changed: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """`hidden` `(P, W, C)` with the `changed` `(P, W)` rows made anew by `project` from `features` `(P, W, C')`."""
    rows = hidden.clone()
    rows[changed] = project(features[changed]).to(hidden)
    return rows


def absorbed(
    features: Tensor,
    keys: Tensor,
    weight: Tensor,
    centres: Tensor,
    among: Tensor,
    neighbours: int,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to some tokens their nearest others, weighted: `x_i + sum weight_j x_j` (PruMerge, arXiv 2403.15388).

    Args:
        features: `(P, W, C)`.
        keys: `(P, W, D)`; near is what has the highest cosine.
        weight: `(P, W)`.
        centres: `(P, W)` bool, the tokens to change.
        among: `(P, W)` bool, the tokens that may be neighbours.
        neighbours: how many of them, at most.
        bonus: `(P, W)` added to the cosine with each neighbour.

    Returns:
        The features with those of the centres replaced, and which have changed.
    """
    x, unit = features.float(), torch.nn.functional.normalize(keys.float(), dim=-1)
    slot = torch.argsort((~centres).long(), dim=1, stable=True)[:, : int(centres.sum(1).max())]
    near = unit.gather(1, _wide(slot, unit)) @ unit.mT
    near = near if bonus is None else near + bonus.float()[:, None]
    own = slot[..., None] == torch.arange(x.shape[1], device=x.device)
    near, index = near.masked_fill(own | ~among[:, None], -torch.inf).sort(dim=-1, descending=True, stable=True)
    near, index = near[..., :neighbours], index[..., :neighbours]
    share = weight.float()[:, None].expand(-1, slot.shape[1], -1).gather(2, index).masked_fill(near == -torch.inf, 0.0)
    gained = torch.zeros_like(own, dtype=x.dtype).scatter(2, index, share) @ x
    values = torch.zeros_like(x).scatter(1, _wide(slot, x), gained)
    changed = centres & (neighbours > 0)
    return torch.where(changed[..., None], x + values, x).to(features), changed


def remainder(features: Tensor, weight: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """One token for those that are `dropped` `(P, W)` bool, on the slot of the one with the highest weight.

    Returns:
        `(P, W)` bool, that slot, nothing in a pool that drops nothing; and `(P, 1, C)` the sum of `weight_j x_j`.
    """
    heavy = weight.masked_fill(~dropped, -torch.inf)
    slot = heavy.argmax(1, keepdim=True)
    at = torch.zeros_like(dropped).scatter(1, slot, dropped.any(1, keepdim=True))
    token = (weight.float() * dropped)[:, None] @ features.float()
    return at, token.to(features)


def arranged(rows: Tensor, kept: Tensor, place: Tensor) -> Tensor:
    """`(P, W, C)`: the rows of the kept tokens, put into the slots of the kept tokens in the order of `place`.

    Args:
        rows: `(P, W, C)`.
        kept: `(P, W)` bool.
        place: `(P, W)`; ascending, and of equal ones the lower index first.
    """
    slots = torch.argsort((~kept).long(), dim=1, stable=True)
    behind = place.double().masked_fill(~kept, torch.inf)
    source = torch.argsort(behind, dim=1, stable=True)
    return rows.scatter(1, _wide(slots, rows), rows.gather(1, _wide(source, rows)))


def farthest_first(similarity: Tensor, present: Tensor, picks: int) -> Tensor:
    """Greedy max-min diversity (DivPrune, arXiv 2503.02175).

    First the token whose nearest other is farthest, then always the one whose nearest pick is farthest.

    Args:
        similarity: `(P, W, W)` fp32; the distance is one minus it.
        present: `(P, W)` bool.
        picks: how many to pick; once a pool is used up, its further picks are empty slots.

    Returns:
        `(P, picks)` long, in order of picking; ties: the lower index.
    """
    width = similarity.shape[1]
    distance = 1.0 - similarity
    alone = torch.eye(width, dtype=torch.bool, device=similarity.device) | ~present[:, None, :]
    nearest = distance.masked_fill(alone, torch.inf).amin(2)
    order: list[Tensor] = []
    open_ = present.clone()
    for _ in range(picks):
        pick = nearest.masked_fill(~open_, -torch.inf).argmax(1, keepdim=True)
        row = distance.gather(1, pick[..., None].expand(-1, -1, width))[:, 0]
        nearest = row if not order else torch.minimum(nearest, row)
        open_ = open_.scatter(1, pick, False)
        order.append(pick)
    return torch.cat(order, 1)


RANK_END = 1e-10
"""Below this gain a DPP kernel has no rank left."""


def dpp_greedy(similarity: Tensor, quality: Tensor, present: Tensor, picks: int) -> Tensor:
    """Greedy MAP of the determinantal point process with kernel `quality_i * similarity_ij * quality_j`.

    The fast form of Chen et al., arXiv 1709.05135: incremental Cholesky rows. When no rank is left, the best qualities
    not yet picked follow.

    Args:
        similarity: `(P, W, W)` fp32, positive semi-definite.
        quality: `(P, W)` fp32, not negative.
        present: `(P, W)` bool.
        picks: how many to pick, at most `W`; once a pool is used up, its further picks are empty slots.

    Returns:
        `(P, picks)` long, in order of picking; ties: the lower index.
    """
    pools, width = quality.shape
    left = similarity.diagonal(dim1=1, dim2=2) * quality * quality
    basis = similarity.new_zeros(pools, picks, width)
    order: list[Tensor] = []
    open_ = present.clone()
    for step in range(picks):
        gain, pick = left.masked_fill(~open_, -torch.inf).max(1, keepdim=True)
        spent = gain < RANK_END
        pick = torch.where(spent, quality.masked_fill(~open_, -torch.inf).argmax(1, keepdim=True), pick)
        wide = pick[..., None]
        row = similarity.gather(1, wide.expand(-1, -1, width))[:, 0] * quality * quality.gather(1, pick)
        known = basis[:, :step]
        row = row - (known.gather(2, wide.expand(-1, step, -1)).mT @ known)[:, 0]
        row = torch.where(spent, 0.0, row / gain.clamp_min(RANK_END).sqrt())
        basis[:, step] = row
        left = (left - row * row).clamp_min(0.0)
        open_ = open_.scatter(1, pick, False)
        order.append(pick)
    return torch.cat(order, 1)


def first_picks(order: Tensor, counts: Tensor, width: int) -> Tensor:
    """`(P, width)` bool: the first `counts` `(P,)` picks of every pool's `order` `(P, T)`."""
    wanted = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    times = torch.zeros(order.shape[0], width, dtype=torch.long, device=order.device)
    return times.scatter_add(1, order, wanted.long()) > 0


def quantile(x: Tensor, present: Tensor, q: float) -> Tensor:
    """`(P,)` the `q`-quantile of the present `x` `(P, W)`, linearly interpolated; infinite for an empty pool."""
    ordered = x.float().masked_fill(~present, torch.inf).sort(1).values
    place = (present.sum(1, keepdim=True) - 1).clamp_min(0) * q
    low, high = ordered.gather(1, place.floor().long()), ordered.gather(1, place.ceil().long())
    return (low + (place - place.floor()) * (high - low))[:, 0]


LOF_OUTLIER = 1.5
"""A local outlier factor above this is an outlier (`contamination="auto"` of the usual library)."""


def local_outlier_factor(x: Tensor, present: Tensor, neighbours: int) -> Tensor:
    """Local outlier factor of numbers (Breunig et al., SIGMOD 2000), 1 where the density is that of the neighbours.

    In one dimension the nearest `k` of a number are among the `k` before and the `k` behind it in sorted order.

    Args:
        x: `(P, W)` float.
        present: `(P, W)` bool, the numbers of a pool; they may stand anywhere.
        neighbours: how many neighbours count; all others where a pool has fewer.

    Returns:
        `(P, W)` fp64; 1 for what is not present, and in pools of one number.
    """
    width, device = x.shape[1], x.device
    total = present.sum(1)[:, None, None]
    order = torch.argsort(x.double().masked_fill(~present, torch.inf), dim=1, stable=True)
    value = x.double().gather(1, order)
    step = torch.arange(1, neighbours + 1, device=device)
    near = torch.arange(width, device=device)[:, None] + torch.stack([-step, step], 1).flatten()  # (W, 2k)
    outside = (near < 0) | (near >= total)
    near = near.clamp(0, width - 1).expand(len(x), -1, -1)
    distance = (value.gather(1, near.flatten(1)).view_as(near) - value[..., None]).abs()
    distance, nearest = distance.masked_fill(outside, torch.inf).sort(dim=-1, stable=True)
    distance, near = distance[..., :neighbours], near.gather(2, nearest[..., :neighbours])
    k = (total - 1).clamp(1, neighbours)
    counted = torch.arange(neighbours, device=device) < k
    reach_of = distance.gather(2, (k - 1).expand(-1, width, -1))[..., 0]
    reach = torch.maximum(reach_of.gather(1, near.flatten(1)).view_as(near), distance).masked_fill(~counted, 0.0)
    density = 1.0 / (reach.sum(-1) / k[..., 0] + 1e-10)
    around = density.gather(1, near.flatten(1)).view_as(near).masked_fill(~counted, 0.0).sum(-1) / k[..., 0]
    factor = torch.ones_like(value).scatter(1, order, around / density)
    return torch.where(present & (present.sum(1, keepdim=True) > 1), factor, 1.0)


def outliers(x: Tensor, present: Tensor, neighbours: int) -> Tensor:
    """`(P, W)` bool, the outliers among the present numbers, by their local outlier factor."""
    return (local_outlier_factor(x, present, neighbours) > LOF_OUTLIER) & present
