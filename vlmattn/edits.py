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


TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, PREFIX, LOCAL, SUMMARY = range(7)
GROUPS = ("text", "text sink", "visual", "visual sink", "prefix", "local", "summary")
"""Kinds of keys. A prefix is text before the image; local and summary are visual tokens that show a detail, or stand
for the whole image."""
VISUAL_GROUPS = (VISUAL, VISUAL_SINK, LOCAL, SUMMARY)
SINK_GROUPS = (TEXT_SINK, VISUAL_SINK)
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
class Boost:
    """Factors of single keys, in the heads that look most at what counts.

    Attributes:
        factor: `(B, S)` fp32, factors of the probabilities.
        rank: `(B, S)` fp32, what counts: of a row's heads those are taken in which the probabilities, weighted by this,
            have the largest sum; of equal ones the lower head.
        within: the groups whose mass divides that sum; none: nothing does.
        share: how many heads are taken, rounded down, at least one.
    """

    factor: Tensor
    rank: Tensor
    within: tuple[int, ...] = ()
    share: float = 0.5


def per_group(neutral: float, values: Mapping[int, float]) -> tuple[float, ...]:
    """A value for every group: `neutral` for those that are not in `values`."""
    return tuple(values.get(group, neutral) for group in range(len(GROUPS)))


@dataclass(frozen=True)
class AttnEdit:
    """A declarative change of attention in some rows of one layer. Order: scores, softmax, masses, mass edit, head
    gain. What is said per group is in the order of `GROUPS`; groups left out at the end are left alone.

    Attributes:
        hide: groups whose keys the rows do not see at all; a row always sees itself.
        scale: per group a factor of the scores (before the softmax), or None.
        logit_strength: per group the `a` of `s + a * |s|`, on scores `s`, or None.
        across_heads: whether `|s|` of a key is its mean over all heads.
        head_limit: above 0: `logit_strength` of a head is multiplied by its share of the visual mass of all heads (in
            the row as it is without the edit) times their number, at most by this.
        bias: `(B, S)` fp32 added to the scores, or None.
        take: per group the share of its mass that is taken away, or None.
        give: the group that receives what was taken, in proportion to its keys' attention.
        min_visual: `take` acts only where the visual groups together have at least this mass, ...
        min_share: ... and where `give` has at least this share of the visual mass.
        coefficient: per group a factor of the probabilities, or None.
        min_mass: per group the mass from which on `coefficient` acts, or None: always.
        renormalise: whether rows sum to 1 again after `coefficient`.
        boosts: factors of single keys, all ranked by the probabilities before the mass edit; rows then sum to 1.
        heads: the query heads that are edited; None: all.
        rows: which prompt rows: `text` (all text rows after the first image), `after` (those after the last one),
            `last` (the last prompt token) or `generated` (none).
        generated: whether the tokens after the prompt are edited as well.
    """

    hide: tuple[int, ...] = ()
    scale: tuple[float, ...] | None = None
    logit_strength: tuple[float, ...] | None = None
    across_heads: bool = False
    head_limit: float = 0.0
    bias: Tensor | None = None
    take: tuple[float, ...] | None = None
    give: int = VISUAL
    min_visual: float = 0.0
    min_share: float = 0.0
    coefficient: tuple[float, ...] | None = None
    min_mass: tuple[float, ...] | None = None
    renormalise: bool = False
    boosts: tuple[Boost, ...] = ()
    heads: tuple[int, ...] | None = None
    rows: str = "text"
    generated: bool = True

    @property
    def maps_scores(self) -> bool:
        """Whether probabilities change before any mass is known."""
        maps = (self.scale, self.logit_strength, self.bias)
        return bool(self.hide) or any(part is not None for part in maps)
