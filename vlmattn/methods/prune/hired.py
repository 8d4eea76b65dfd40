"""HiRED: the visual tokens that the vision tower's CLS token attends to most, by crop.

Idea: what CLS looks at in the layer whose output the projector reads is what an image is about; a fixed share of these
tokens stays, whatever the question. Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of
High-Resolution Vision-Language Models", arXiv 2408.10945.

Of an image in tiles a share `alpha` of the budget goes to the picture of the whole image. The rest goes to the tiles in
proportion to how many of the best int(V * (1 - alpha)) tokens of that picture, by CLS attention of the first layer,
lie in the part of it that a tile shows. Every crop keeps its best by CLS attention of the feature layer. Where there
are no tiles an image is one crop, and a video has one a frame, each with the same share.

Deviations from the released code: what padding the model cuts off a mosaic is no token here, so that it takes none of
the budget; the budget is the nearest number of tokens, and what division and full tiles leave over goes to other tiles
and to the whole picture (`exact_budget=False`: rounded down, as in the code, but at least one token of an image or
video stays); tokens of the first layer's choice are counted in the part of the picture that a tile shows
(`region_split=raster`: in equal runs of the raster order, as in the code); of the newline tokens those of rows that
keep a token stay (`line_ends=none`: none, as in the code); kept tokens keep their positions (`positions="compact"` is
the code's). Towers without CLS rank by the attention received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Keep
from vlmattn.methods.base import NEWLINES, Look, Pruner, View, param, register
from vlmattn.spans import Span


@register("hired", title="HiRED: Attention-Guided Token Dropping", paper="2408.10945")
@dataclass(frozen=True)
class HiRED(Pruner):
    """Keep the tokens that CLS attends to most, every frame its share."""

    entry_only: ClassVar[bool] = True

    keep: float | int = param(0.2, "share (float in (0, 1]) or number (int) of the visual tokens that stays")
    alpha: float = param(0.5, "share of an image's budget that the picture of the whole image gets, if there are tiles")
    counted: float | None = param(None, "share of that picture's tokens that are counted by tile; None: 1 - alpha")
    region_split: str = param(
        "spatial", "counted 'spatial', in the part a tile shows, or in runs of the 'raster' (code)"
    )
    line_ends: str = param(
        "rows", "newline tokens that stay: those of 'rows' that keep a token, 'all', or 'none' (code)"
    )
    exact_budget: bool = param(True, "spend what rounding down would leave over")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._flag("exact_budget")
        self._one_of("region_split", ("spatial", "raster"))
        self._one_of("line_ends", NEWLINES)
        self._number("alpha", "a number in [0, 1]", lambda alpha: 0 <= alpha <= 1)
        if self.counted is not None:
            self._number("counted", "None, or a number in [0, 1]", lambda share: 0 <= share <= 1)

    @property
    def newlines(self) -> str:
        """As `line_ends` says."""
        return self.line_ends

    @property
    def looks(self) -> Mapping[str, Look]:
        """The CLS row of the feature layer, and for tiles that of the first."""
        return {"attention": Look("attention"), "early": Look("attention", 0, tiled=True)}

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """The budget of an image."""
        if self.exact_budget or isinstance(self.keep, int):
            return budget.count(arriving, self.keep)
        return max(int(arriving * self.keep), 1)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """The budget; of a video what its frames' budgets make together."""
        frames = grid[0] if grid and self.budget_scope == "image" else 1
        return sum(tile_budgets([1] * frames, self.quota(visual, visual, stage), visual // frames, self.exact_budget))

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention, summed over heads."""
        return view.vision["attention"].sum(-1)

    def select(self, view: View) -> Keep:
        """The best of every crop."""
        group, counts = self.groups(view)
        if self.budget_scope == "image":
            group, counts = self._by_crop(view, counts)
        return Keep.top(self.score(view), group, counts)

    def _by_crop(self, view: View, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Groups and budgets with every crop of an image a group of its own."""
        crops = [[crops_of(span) for span in spans] for spans in view.spans]
        most = max((len(crop.bincount()) for row in crops for crop in row), default=1)
        if most == 1:
            return view.image, counts
        group, shares = view.image * most, torch.zeros(*counts.shape, most, dtype=torch.long)
        for row, spans in enumerate(view.spans):
            for span, crop in zip(spans, crops[row], strict=True):
                mine = view.image[row] == span.image
                group[row, mine] += crop.to(group.device)
                budgets = self._budgets(view, row, span, crop.bincount().tolist(), int(counts[row, span.image]))
                shares[row, span.image, : len(budgets)] = torch.tensor(budgets)
        return torch.where(view.image >= 0, group, -1), shares.view(len(shares), -1).to(counts.device)

    def _budgets(self, view: View, row: int, span: Span, sizes: list[int], total: int) -> list[int]:
        """How many tokens of each crop of an image stay."""
        if len(span.rasters) < 2:
            return tile_budgets([1] * len(sizes), total, sizes, self.exact_budget)
        base, mosaic = sizes[0], sizes[1:]
        full = min(int(total * self.alpha + 1e-9), base)
        rest = min(total - full, sum(mosaic))
        hits = self._hits(view, row, span)
        return [total - rest if self.exact_budget else full, *tile_budgets(hits, rest, mosaic, self.exact_budget)]

    def _hits(self, view: View, row: int, span: Span) -> list[int]:
        """Of the tokens of the whole picture that early attention picks, how many each tile shows."""
        picture, mosaic = span.rasters[:2]
        early = view.vision["early"][row, (view.image[row] == span.image).to(view.vision["early"].device)].sum(-1)
        order = early[: picture.length].argsort(descending=True, stable=True)
        share = 1 - self.alpha if self.counted is None else self.counted
        picked = order[: int(picture.length * share + 1e-9)]
        assert mosaic.tiles is not None
        down, across = map(len, mosaic.tiles)
        if self.region_split == "raster":
            tile = picked * (down * across) // picture.length
        else:
            _, height, width = picture.grid
            tile = picked // width * down // height * across + picked % width * across // width
        return tile.bincount(minlength=down * across).tolist()


def crops_of(span: Span) -> Tensor:
    """`(length,)` long, the crop that each token of an image belongs to: a frame, the whole picture, or a tile."""
    found: list[Tensor] = [torch.zeros(span.length, dtype=torch.long)] if not span.rasters else []
    first = 0
    for raster in span.rasters:
        frames, height, width = raster.grid
        if raster.tiles is None:
            crop = torch.arange(frames)[:, None].expand(-1, height * width)
        else:
            down, across = (torch.arange(len(runs)).repeat_interleave(torch.tensor(runs)) for runs in raster.tiles)
            crop = down[:, None] * len(raster.tiles[1]) + across
        found.append(crop.flatten() + first)
        first += frames if raster.tiles is None else len(raster.tiles[0]) * len(raster.tiles[1])
    return torch.cat(found)


def tile_budgets(counts: list[int], total: int, cap: int | list[int], exact: bool = True) -> list[int]:
    """How many of `total` tokens each tile or frame may keep: in proportion to `counts`, at most `cap` each.

    Args:
        counts: tokens of the tile that early attention picks, or any other weight.
        total: of all tiles.
        cap: tokens of a tile, or of each of them.
        exact: spend what rounding down and `cap` leave over, the largest fractions first; if not, only one token where
            otherwise none would stay.
    """
    weight, caps = sum(counts), [cap] * len(counts) if isinstance(cap, int) else cap
    budgets = [min(total * count // max(weight, 1), most) for count, most in zip(counts, caps, strict=True)]
    left = total - sum(budgets) if exact else int(total > 0 and not any(budgets))
    by_fraction = sorted(range(len(counts)), key=lambda tile: -(total * counts[tile] % max(weight, 1)))
    while left > 0 and (room := [tile for tile in by_fraction if budgets[tile] < caps[tile]]):
        each = max(left // len(room), 1)
        for tile in room[:left]:
            more = min(each, caps[tile] - budgets[tile])
            budgets[tile], left = budgets[tile] + more, left - more
    return budgets
