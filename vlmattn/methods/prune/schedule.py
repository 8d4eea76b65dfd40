"""Schedules: a number of visual tokens for every decoder layer, none growing, ranked by attention on the way.

Idea: tokens that deep layers need are among those that shallow layers need, so a budget is best spent as a curve over
depth. Two forms of it: shares found by a search (`shares`, one a layer, G-Search), and a falling sigmoid whose middle
is placed so that the average is `keep` (P-Sigmoid). Zhao et al., "Accelerating Multimodal Large Language Models by
Searching Optimal Vision Token Reduction", arXiv 2412.00556. The searches belong to tuning; this is what runs.

Sigmoid: r(l) = floor + (ceiling - floor) * sigmoid(-steepness * (l - b)). n_l = round(V * r(l)), at least 1, at most
n_(l-1). Scores: attention received in the layer before, mean over heads and over the text behind the image.

There is no released code; everything the abstract leaves open is our choice: the curve, the rows of the score, tokens
counted from those of the image as it came, and that b is solved with the layers before the first prunable one at
their full size, so that `keep` is the average over all layers (one that no such curve has is refused); what rounding
leaves over goes to the deepest layer that can take it. Layers prune together in groups of `group`, by the group's mean
share; `rank_once` ranks at the first stage and keeps to that order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.errors import BudgetError, LayerError, SpecError
from vlmattn.methods.base import Attention, Pruner, View, param, register


def sigmoid_shares(
    layers: Sequence[int], steepness: float, middle: float, floor: float = 0.0, ceiling: float = 1.0
) -> list[float]:
    """`floor + (ceiling - floor) * sigmoid(-steepness * (l - middle))` for every layer l."""
    scaled = [min(max(steepness * (layer - middle), -700.0), 700.0) for layer in layers]
    return [floor + (ceiling - floor) / (1.0 + math.exp(x)) for x in scaled]


def middle_of(layers: Sequence[int], mean: float, steepness: float, floor: float = 0.0, ceiling: float = 1.0) -> float:
    """The middle at which the sigmoid over some layers has this mean; the nearest there is where none has."""
    reach = 40.0 / steepness
    low, high = min(layers) - reach, max(layers) + reach
    for _ in range(100):
        centre = (low + high) / 2
        if sum(sigmoid_shares(layers, steepness, centre, floor, ceiling)) < mean * len(layers):
            low = centre
        else:
            high = centre
    return (low + high) / 2


@register("schedule", title="Searching Optimal Vision Token Reduction", paper="2412.00556")
@dataclass(frozen=True)
class Schedule(Pruner):
    """Keep as many visual tokens in every layer as a falling curve says, ranked by the text's attention."""

    min_layer: ClassVar[int] = 1
    instead_of_keep: ClassVar[str] = "shares"

    keep: float | int = param(0.125, "average share (or number) of the visual tokens over all decoder layers")
    before_layer: int | tuple[int, ...] | None = param(None, "the first decoder layer that prunes; None: layer 1")
    shares: tuple[float, ...] | None = param(None, "share of the image's tokens in each layer, in place of the sigmoid")
    steepness: float = param(0.5, "how fast the sigmoid falls, per layer")
    floor: float = param(0.0, "share that the sigmoid falls to")
    ceiling: float = param(1.0, "share that the sigmoid falls from")
    group: int = param(2, "layers that prune together; with `shares` every layer has its own")
    query: str = param("after", "whose attention counts: all text 'after' the image, or the 'last' prompt token")
    rank_once: bool = param(False, "whether the ranking of the first stage serves all")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("query", ("after", "last"))
        self._flag("rank_once")
        self._count("group", 1)
        self._number("steepness", "a finite number above 0", lambda steepness: 0 < steepness < math.inf)
        self._number("ceiling", "a share in [0, 1]", lambda ceiling: 0 <= ceiling <= 1)
        self._number("floor", "a share from 0 to `ceiling`", lambda floor: 0 <= floor <= self.ceiling)
        if self.shares is not None:
            if not isinstance(self.shares, list | tuple):
                raise SpecError(f"schedule.shares={self.shares!r}: expected one share a layer, such as [1.0, 0.5]")
            object.__setattr__(self, "shares", tuple(self.shares))
            for share in self.shares:
                if isinstance(share, bool) or not isinstance(share, int | float):
                    raise SpecError(f"schedule.shares={self.shares!r}: expected numbers in (0, 1], not {share!r}")
                budget.check(float(share), "schedule.shares")
            if any(b > a for a, b in itertools.pairwise(self.shares)):
                raise BudgetError(f"schedule.shares={self.shares!r} grows: a dropped token cannot come back")

    @property
    def is_noop(self) -> bool:
        """True where every layer keeps everything."""
        return super().is_noop if self.shares is None else set(self.shares) == {1.0}

    def disabled(self) -> Schedule:
        """The same with an average of 1."""
        return dataclasses.replace(self, keep=1.0, shares=None)

    @property
    def attention(self) -> Attention:
        """Of the rows that `query` names, in the layer before."""
        return Attention(self.query, once=self.rank_once)

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """The layers where the curve falls: the first of each group, or where `shares` has a lower one."""
        (first,) = super().stages(num_layers) if self.before_layer is not None else (1,)
        if self.shares is None:
            return tuple(range(first, num_layers, self.group))
        if len(self.shares) != num_layers:
            raise LayerError(f"{self}: {len(self.shares)} shares do not fit a model of {num_layers} decoder layers")
        falls = [layer for layer in range(num_layers) if self.shares[layer] < ([1.0, *self.shares])[layer]]
        if falls and falls[0] < first:
            raise LayerError(f"{self}: layer {falls[0]} has a share below 1, but the first that prunes is {first}")
        return tuple(falls)

    def resolved(self, num_layers: int) -> Schedule:
        """The same with its first layer written out."""
        first = self.before_layer if self.before_layer is not None else 1
        return dataclasses.replace(self, before_layer=first)

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """The schedule of one image, in whole tokens."""
        stages = self.stages(num_layers)
        if not visual or not stages or self.is_noop:
            return [visual] * num_layers
        sizes = [b - a for a, b in itertools.pairwise((*stages, num_layers))]
        counts = [visual] * stages[0]
        for count, size in zip(self._counts(visual, num_layers, stages, sizes), sizes, strict=True):
            counts += [count] * size
        return counts

    def groups(self, view: View) -> tuple[Tensor, Tensor]:
        """The budget group of every token and what the schedule leaves of each group in this layer."""
        group, arriving, lengths = view.image, view.counts.tolist(), view.lengths
        if self.budget_scope == "sample":
            group = group.clamp_max(0)
            arriving, lengths = [[sum(row)] for row in arriving], [[sum(row)] for row in lengths]
        table = {n: self.expected_tokens(n, view.num_layers)[view.layer] for row in lengths for n in row}
        kept = [[min(n, table[total]) for n, total in zip(*row, strict=True)] for row in zip(arriving, lengths)]
        return group, torch.tensor(kept, dtype=torch.long, device=view.image.device)

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention received, mean over heads and rows."""
        assert view.scores is not None
        return view.scores

    def _counts(self, visual: int, num_layers: int, stages: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Tokens after each stage."""
        if self.shares is not None:
            shares = [self.shares[layer] for layer in stages]
            return [max(math.floor(visual * share + 0.5), 1) for share in shares]
        average = self.keep if isinstance(self.keep, float) else min(self.keep / visual, 1.0)
        self._reach(average, visual, num_layers, stages[0])
        left = average * num_layers - stages[0]  # the sum of the shares of the layers that prune
        layers = range(stages[0], num_layers)
        middle = middle_of(layers, left / len(layers), self.steepness, self.floor, self.ceiling)
        curve = sigmoid_shares(layers, self.steepness, middle, self.floor, self.ceiling)
        bounds = [0, *itertools.accumulate(sizes)]
        shares = [sum(curve[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
        counts = [max(math.floor(visual * share + 0.5), 1) for share in shares]
        return repaired(counts, sizes, math.floor(left * visual + 0.5), visual)

    def _reach(self, average: float, visual: int, num_layers: int, first: int) -> None:
        """Refuse an average that no curve from `ceiling` to `floor` has, with at least one token in a layer.

        Raises:
            BudgetError: it is off by more than rounding.
        """
        deep = num_layers - first
        low, high = (
            (first + deep * max(share, 1 / visual)) / num_layers for share in (float(self.floor), float(self.ceiling))
        )
        rounding = deep / (2 * visual * num_layers) + 1e-9
        if not low - rounding <= average <= high + rounding:
            raise BudgetError(
                f"{self}: the average cannot be {average:.4g}: with layers 0 to {first - 1} of {num_layers} full and "
                f"the others from ceiling={self.ceiling:g} to floor={self.floor:g} it is between {low:.4g} and "
                f"{high:.4g} of the visual tokens: give such a `keep`, or another `floor` or `ceiling`"
            )


def repaired(counts: list[int], sizes: Sequence[int], total: int, most: int) -> list[int]:
    """Falling counts changed at the deepest place that can take it until `counts . sizes` is nearest to the total.

    Args:
        counts: at least 1 each, none growing.
        sizes: layers of each.
        total: what the sum over layers should be.
        most: the largest count there may be.
    """
    counts = list(counts)
    over = sum(map(int.__mul__, counts, sizes)) - total
    while True:
        step = -1 if over > 0 else 1
        deepest = range(len(counts) - 1, -1, -1)
        if step < 0:
            place = next((i for i in deepest if counts[i] > 1), None)
        else:
            place = next((i for i in deepest if counts[i] < (counts[i - 1] if i else most)), None)
        if place is None or abs(over + step * sizes[place]) >= abs(over):
            return counts
        counts[place] += step
        over += step * sizes[place]
