"""Decisions of methods, as data. Methods return these; only the engine touches the tensors of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Which visual tokens stay.

    Attributes:
        mask: `(B, V)` bool over the visual tokens a `View` shows; True stays. Entries of padding slots are ignored.
    """

    mask: Tensor

    @classmethod
    def from_index(cls, index: Tensor, like: Tensor) -> Keep:
        """Keep the tokens named by `index` `(B, n)` (long) out of `like` `(B, V)`."""
        mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        return cls(mask.scatter(1, index, torch.ones_like(index, dtype=torch.bool)))

    @classmethod
    def top(cls, score: Tensor, group: Tensor, counts: Tensor) -> Keep:
        """Keep the best-scored tokens of every group; of equal scores the lower index wins.

        Args:
            score: `(B, V)` float; higher is better.
            group: `(B, V)` long in `[0, G)`, or -1 for a padding slot, which is never kept.
            counts: `(B, G)` long, how many of each group stay.
        """
        by_score = torch.argsort(score, dim=1, descending=True, stable=True)
        by_group = torch.argsort(group.gather(1, by_score), dim=1, stable=True)
        order = by_score.gather(1, by_group)
        sorted_group = group.gather(1, order).contiguous()
        start = torch.searchsorted(sorted_group, sorted_group, right=False)
        rank = torch.arange(order.shape[1], device=order.device).expand_as(order) - start
        allowed = counts.gather(1, sorted_group.clamp_min(0))
        stays = (rank < allowed) & (sorted_group >= 0)
        return cls(torch.zeros_like(stays).scatter(1, order, stays))
