"""Decisions of methods, as data. Methods return these; only the engine touches the tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Which visual tokens stay, and what merging makes of them.

    Attributes:
        mask: `(B, V)` bool over the visual tokens a `View` shows; True stays. Entries of padding slots are ignored.
        rows: `(B, V, C)` new values of their rows of the layer input, or None: unchanged. Those of dropped tokens are
            ignored, so a merged token sits on the slot, and at the position, of one that stays.
        merge: `(B, V, C)` features to what merging makes of them, for those that a model adds to its visual rows again
            behind later layers (DeepStack); None: a token that stays takes its own.
    """

    mask: Tensor
    rows: Tensor | None = None
    merge: Callable[[Tensor], Tensor] | None = None

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


@dataclass(frozen=True)
class Eviction:
    """What happens to the keys and values that one layer holds.

    Attributes:
        keep: `(B, S)` bool over the slots of a `CacheView`; False leaves the cache for good. None: everything stays.
            Entries of slots that hold no token are ignored.
        hide: `(B, S)` bool, those that stay but are not computed in the passes in which `Evictor.hides` says so, until
            the next decision; None: none.
        state: what the next decision about this layer gets back, tensors `(B, ..., S)` by the method's own names; they
            are cut like the keys, and 0 for tokens that come later.
    """

    keep: Tensor | None = None
    hide: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


TEXT, TEXT_SINK, VISUAL, VISUAL_SINK = range(4)
GROUPS = ("text", "text sink", "visual", "visual sink")
NOT_A_KEY = 255
"""Tag of padding, dropped and unwritten slots."""


@dataclass(frozen=True)
class Tags:
    """The group of every key of one layer.

    Attributes:
        tag: `(B, S)` uint8, an index into `GROUPS`, or `NOT_A_KEY`.
        active: `(B,)` bool, samples in which the edit of this layer acts.
        acts: whether there is any such sample, known on the host so that later steps need not look.
    """

    tag: Tensor
    active: Tensor
    acts: bool = False

    def without_last(self, n: int) -> Tags:
        """The groups without the last `n` keys."""
        return Tags(self.tag[:, :-n], self.active, self.acts)

    def longer(self, n: int) -> Tags:
        """The groups with `n` more keys, of text."""
        return Tags(torch.nn.functional.pad(self.tag, (0, n), value=TEXT), self.active, self.acts)

    def at(self, slots: Tensor, valid: Tensor | None) -> Tags:
        """The groups of the keys in `slots` `(B, M)` long; those that are not `valid` are no keys."""
        tag = self.tag.gather(1, slots.to(self.tag.device))
        if valid is not None:
            tag = tag.masked_fill(~valid.to(tag.device), NOT_A_KEY)
        return Tags(tag, self.active, self.acts)

    def rows(self, index: Tensor) -> Tags:
        """The groups of some rows of the batch, `index` `(n,)` long."""
        index = index.to(self.tag.device)
        return Tags(self.tag[index], self.active[index], self.acts)


@dataclass(frozen=True)
class AttnEdit:
    """A declarative change of attention in some rows of one layer. Order: scores, softmax, masses, mass edit, head
    gain.

    Attributes:
        hide: groups whose keys the rows do not see at all; a row always sees itself.
        scale: per group a factor of the scores (before the softmax), or None.
        logit_strength: visual scores `s` become `s + logit_strength * |s|`.
        bias: `(B, S)` fp32 added to the scores, or None.
        take: per group the share of its mass that is taken away, or None.
        give: the group that receives what was taken, in proportion to its keys' attention.
        min_visual: the mass edit acts only where the visual groups together have at least this mass, ...
        min_share: ... and where `give` has at least this share of the visual mass.
        coefficient: per group a factor of the probabilities, or None.
        renormalise: whether rows sum to 1 again after `coefficient`.
        rows: which prompt rows: `text` (all text rows after the first image), `last` or `generated` (none).
        generated: whether the tokens after the prompt are edited as well.
    """

    hide: tuple[int, ...] = ()
    scale: tuple[float, ...] | None = None
    logit_strength: float = 0.0
    bias: Tensor | None = None
    take: tuple[float, ...] | None = None
    give: int = VISUAL
    min_visual: float = 0.0
    min_share: float = 0.0
    coefficient: tuple[float, ...] | None = None
    renormalise: bool = False
    rows: str = "text"
    generated: bool = True

    @property
    def maps_scores(self) -> bool:
        """Whether probabilities change before any mass is known."""
        return bool(self.hide) or self.scale is not None or self.logit_strength != 0.0 or self.bias is not None
