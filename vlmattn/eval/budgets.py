"""Budgets that make methods comparable: the same visual tokens per decoder layer, on average.

A method that prunes before layer k leaves the first k layers full: at the same `keep` it sees more than one that prunes
before the language model. The average of visual tokens over the layers is what both have in common.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vlmattn.errors import BudgetError, DataError

IN_MODEL = (0.75, 0.5, 0.35)
BEFORE_MODEL = (0.5, 0.25, 0.11)
_UNUSUAL = 0.123456789
"""A budget that is nobody's default."""


@dataclass(frozen=True)
class Match:
    """A spec whose budget was chosen for a level, or why there is none.

    Attributes:
        level: wanted visual tokens per layer as a share of those of the image; None for a spec without a budget.
        spec: canonical spec text; None where the level is below the floor.
        average: visual tokens per layer that `spec` has; None without a spec.
        floor: the fewest visual tokens per layer that the method can have: its average with a single token kept.
        visual_tokens: of the image that was counted with.
        refused: why the method has no budget for the level although it is above the floor; "" otherwise.
        label: what tables call it: `spec` with its `keep` even where that is the default; below the floor the method
            without a `keep` and the level, such as "fastv(before_layer=2) at 0.35".
    """

    level: float | None
    spec: str | None
    average: float | None
    floor: float
    visual_tokens: int
    label: str
    refused: str = ""

    @property
    def floor_share(self) -> float:
        """The floor as a share of the image's visual tokens."""
        return self.floor / self.visual_tokens

    @property
    def floor_text(self) -> str:
        """What a table says about a level below the floor; "" where the level is reached."""
        if self.level is None or self.spec is not None:
            return ""
        if self.refused:
            return f"level {self.level:g} cannot be reached: {self.refused}"
        return (
            f"level {self.level:g} cannot be reached: with its smallest budget the method leaves {self.floor:.4g} of "
            f"{self.visual_tokens} visual tokens a layer on average; the floor is {100 * self.floor_share:.1f} % of "
            "the visual tokens"
        )


def match_average_tokens(
    spec: str,
    levels: Sequence[float] | None = None,
    *,
    num_layers: int,
    visual_tokens: int,
    grid: tuple[int, int, int] | None = None,
) -> list[Match]:
    """The spec with budgets whose average visual tokens per layer are nearest to the levels.

    `keep` is written as a share with as few digits as give exactly that many tokens of an image of `visual_tokens`, so
    that it means the same for images of other sizes.

    Args:
        spec: spec text with at most one pruner; its `keep` is replaced, all else stays.
        levels: shares of `visual_tokens`; default: 0.75, 0.5 and 0.35 for a pruner inside the language model, 0.5, 0.25
            and 0.11 for one before its first layer.
        num_layers: decoder layers of the model.
        visual_tokens: of an image.
        grid: `(t, h, w)` of them, for methods that look at it.

    Returns:
        A match per level, in the order of the levels. A level below the method's floor by more than half of what one
        token more or less changes has no spec, nor has one for which the method refuses all budgets. A spec without a
        budget (no pruner, or one without `keep`, or with a parameter in its place) is one match without a level.

    Raises:
        DataError: several pruners, a level outside (0, 1], no visual tokens or no layers.
        SpecError, LayerError: the spec cannot be read, or does not fit the depth.
    """
    from vlmattn import spec as specs

    if num_layers < 1 or visual_tokens < 1:
        raise DataError(
            f"{visual_tokens} visual tokens in {num_layers} layers: there must be at least one of each to match budgets"
        )
    if levels is not None and (wrong := [level for level in levels if not 0 < level <= 1]):
        raise DataError(f"level {wrong[0]:g} is outside (0, 1]: levels are shares of an image's visual tokens")
    methods = specs.parse(spec)
    pruners = [method for method in methods if method.kind == "prune"]
    if len(pruners) > 1:
        raise DataError(
            f"{spec}: {len(pruners)} pruners share the tokens in more than one way: give their budgets yourself, "
            "or match specs with one pruner"
        )

    def at(keep: float) -> list[int]:
        changed: Any = dataclasses.replace(pruners[0], keep=keep)  # type: ignore[call-arg]
        return list(changed.expected_tokens(visual_tokens, num_layers, grid))

    def counts(tokens: int) -> list[int]:
        return at(tokens / visual_tokens)  # a share, which every method takes

    def refusal(tokens: int) -> str:
        try:
            counts(tokens)
        except BudgetError as error:
            return str(error)
        return ""

    def spec_of(keep: Any) -> str:
        return specs.text(specs.replace(methods, f"{pruners[0].name}.keep", keep))

    def label_of(keep: float) -> str:
        return spec_of(_UNUSUAL).replace(repr(_UNUSUAL), repr(keep))  # a default would not be written

    if not pruners or not takes_keep(pruners[0]):
        per_layer = pruners[0].expected_tokens(visual_tokens, num_layers, grid) if pruners else [visual_tokens]
        average = fmean(per_layer)
        return [Match(None, specs.text(methods), average, average, visual_tokens, specs.text(methods))]
    default = next(field.default for field in dataclasses.fields(pruners[0]) if field.name == "keep")
    bare = spec_of(default)  # a default is not written
    least = next(
        tokens for tokens in range(1, visual_tokens + 1) if not refusal(tokens)
    )  # all of them are never refused
    smallest = counts(least)
    floor, chosen = fmean(smallest), levels
    if chosen is None:
        chosen = IN_MODEL if smallest[0] == visual_tokens else BEFORE_MODEL
    more = next((tokens for tokens in range(least + 1, visual_tokens + 1) if not refusal(tokens)), least)
    step = fmean(counts(more)) - floor
    found = []
    for level in chosen:
        target = level * visual_tokens
        if floor - target > step / 2:
            found.append(Match(level, None, None, floor, visual_tokens, f"{bare} at {level:g}"))
            continue
        # A budget that is refused is sought on the side where its share says.
        near = _near(target, least, visual_tokens, lambda n: n if refusal(n) else fmean(counts(n)))
        allowed = [tokens for tokens in near if not refusal(tokens)]
        if not allowed:
            why = refusal(near[len(near) // 2])
            found.append(Match(level, None, None, floor, visual_tokens, f"{bare} at {level:g}", why))
            continue
        tokens = min(allowed, key=lambda n: (abs(fmean(counts(n)) - target), n))
        keep = next(share for share in _shares(tokens, visual_tokens) if _same(at, share, counts(tokens)))
        found.append(Match(level, spec_of(keep), fmean(counts(tokens)), floor, visual_tokens, label_of(keep)))
    return found


def _same(at: Callable[[float], list[int]], share: float, wanted: list[int]) -> bool:
    """Whether a share is allowed and gives the counts."""
    try:
        return at(share) == wanted
    except BudgetError:
        return False


def takes_keep(method: Any) -> bool:
    """Whether the number of tokens that a pruner leaves is chosen with `keep`, and with no parameter in its place."""
    return "keep" in {field.name for field in dataclasses.fields(method)} and not getattr(method, "fixed", False)


def shortest_share(tokens: int, total: int) -> float:
    """The share with the fewest digits that is `tokens` of `total` tokens, both at least 1."""
    return next(share for share in _shares(tokens, total) if left(total, share) == tokens)


def left(total: int, keep: float | int) -> int:
    """How many of `total` tokens a budget leaves."""
    from vlmattn import spec as specs

    [pruner] = specs.parse(f"random(keep={keep!r}, before_layer=0)")
    return pruner.expected_tokens(total, 1)[0]


def _near(target: float, least: int, most: int, average: Callable[[int], float]) -> range:
    """Numbers of tokens around the first whose average reaches the target.

    Budgets that are only nearly monotone, such as those that fill whole rows of a grid, are off by less than a row.
    """
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        if average(middle) < target:
            low = middle + 1
        else:
            high = middle
    row = math.isqrt(most) + 1
    return range(max(least, low - row), min(most, low + row) + 1)


def _shares(tokens: int, total: int) -> Iterator[float]:
    """`tokens / total` with more and more digits."""
    for digits in range(2, 17):
        if 0 < (share := round(tokens / total, digits)) <= 1:
            yield share
    yield tokens / total
