"""SparseVLM: the words that the image answers to rate its tokens, three times; the first version recycles the rest.

Idea: not every word of a prompt has to do with the image, so let only those text tokens that match it rate the visual
tokens, and make a few tokens of what is dropped. Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient
Vision-Language Model Inference", arXiv 2410.04417.

Raters, once, from the input embeddings: `r_i = mean over visual rows of softmax over text columns of V T'`, T the text
behind the image; raters are those above the mean of r. Stages, after layers 2, 6 and 15 of 32: attention received in
that layer, mean over raters and heads; the best stay. Recycling: of what a stage drops take the best int(0.3 n) + 1,
cluster them by density peaks into int(m / 10) + 1 groups, and put each group's mean at its peak.

`keep` is the released code's budget (192, 128, 96, 64 of 576); the numbers after each stage are those of its tables
`v2` and `v1`, scaled to the image and, between budgets, interpolated; the real average is higher, since early layers
are full. `heads` is the share of heads that count, those with the most attention on the image (14 of 32 in v2; v1 takes
all: `table=v1, heads=1.0, recycle=True`).

Deviations from the released code: every sample of a batch has its own raters; the last token rates where no text is
behind the image; a budget that keeps everything drops nothing; positions stay (`positions=compact` for v1), a recycled
token's at its peak; among equal densities the lower index is the denser instead of noise on them; v2's division by a
map of rotary distance is left out, since the map crosses zero.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import SpecError
from vlmattn.methods.base import Attention, LayerView, Pruner, View, param, register
from vlmattn.methods.prune._select import Pools, ranks

TOKENS = 576
"""What the code's budgets and tables are of."""

TABLES = {
    "v1": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "v2": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
"""Visual tokens after each stage, by budget."""

RECYCLED, CLUSTERED = 0.3, 10


def raters(visual: Tensor, text: Tensor, seen: Tensor, spoken: Tensor) -> Tensor:
    """Text tokens that match the image better than the mean of them does.

    Args:
        visual: `(B, V, C)` input embeddings, `seen` `(B, V)` bool where there is one.
        text: `(B, T, C)` and `spoken` `(B, T)` bool alike.

    Returns:
        `(B, T)` bool.
    """
    logits = (visual.float() @ text.float().mT).masked_fill(~spoken[:, None], -torch.inf)
    shares = logits.softmax(-1).nan_to_num() * seen[..., None]
    rating = shares.sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
    mean = rating.sum(1, keepdim=True) / spoken.sum(1, keepdim=True).clamp_min(1)
    return (rating > mean) & spoken


def density_peaks(x: Tensor, present: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Density-peak clustering of each pool (Rodriguez and Laio 2014, with the k nearest neighbours' density).

    A token's density is exp(-mean squared distance to its k nearest, itself among them), k the number of clusters;
    distances are divided by sqrt(C). Its weight as a peak is density times the distance to the nearest denser token,
    the largest of all distances where there is none. Ties: the lower index is denser, and the better peak.

    Args:
        x: `(P, W, C)`.
        present: `(P, W)` bool.
        clusters: `(P,)` long, at most as many as tokens.

    Returns:
        `(P, W)` bool peaks, and `(P, W)` long, the peak that each token belongs to.
    """
    width = x.shape[1]
    both = present[:, None] & present[:, :, None]
    distance = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[2])
    near = distance.masked_fill(~both, torch.inf).sort(-1).values
    within = torch.arange(width, device=x.device) < clusters[:, None, None]
    density = torch.exp(-(near.square().masked_fill(~within, 0.0).sum(-1) / clusters[:, None]))
    order = ranks(density, present)
    denser = (order[:, None, :] < order[:, :, None]) & both
    largest = distance.masked_fill(~both, 0.0).amax((1, 2))
    ahead = distance.masked_fill(~denser, torch.inf).amin(-1)
    peak = ranks(density * torch.where(denser.any(-1), ahead, largest[:, None]), present) < clusters[:, None]
    peak = peak & present
    member = distance.masked_fill(~peak[:, None], torch.inf).argmin(-1)
    own = torch.arange(width, device=x.device).expand_as(member)
    return peak, torch.where(peak, own, member)


@register("sparsevlm", title="SparseVLM: Visual Token Sparsification", paper="2410.04417")
@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Keep at each of three stages the visual tokens that the matching words attend to most."""

    paper_layers: ClassVar[tuple[int, ...]] = (2, 6, 15)
    paper_after: ClassVar[bool] = True
    min_layer: ClassVar[int] = 1

    keep: float | int = param(0.3333, "the code's budget as a share (or number) of the visual tokens")
    table: str = param("v2", "numbers of tokens after each stage: of the released 'v2' or 'v1'")
    heads: float = param(0.4375, "share of the heads that count, those that look at the image most")
    recycle: bool = param(False, "whether clusters of dropped tokens stay as their means")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("table", tuple(TABLES))
        if isinstance(self.heads, bool) or not isinstance(self.heads, float) or not 0 < self.heads <= 1:
            raise SpecError(f"sparsevlm.heads={self.heads!r} is outside (0, 1]: give the share of heads that count")
        self._flag("recycle")

    @property
    def merges(self) -> bool:
        """With recycling."""
        return self.recycle

    @property
    def needs(self) -> frozenset[str]:
        """Rows of the layer input, to recycle them."""
        return frozenset({"layer_input"}) if self.recycle else frozenset()

    @property
    def attention(self) -> Attention:
        """Of the raters, in the layer before."""
        return Attention("own", heads=self.heads < 1)

    def query_rows(self, view: LayerView) -> Tensor:
        """The raters among the text behind the image."""
        after = (view.visual.flip(1).cumsum(1) == 0).flip(1) & view.real
        (see, seen), (say, spoken) = _front(view.visual), _front(after)
        chosen = raters(_taken(view.hidden, see), _taken(view.hidden, say), seen, spoken)
        return torch.zeros_like(after).scatter(1, say, chosen)

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """The table's number at this budget, scaled to the image."""
        budget = self.keep * TOKENS if isinstance(self.keep, float) else min(self.keep / length, 1.0) * TOKENS
        points = {0: (0, 0, 0)} | TABLES[self.table] | {TOKENS: (TOKENS,) * 3}
        low, high = next((a, b) for a, b in itertools.pairwise(points) if budget <= b)
        part = (budget - low) / (high - low)
        wanted = points[low][stage] + part * (points[high][stage] - points[low][stage])
        return min(max(math.floor(wanted * length / TOKENS + 0.5), 1), arriving)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """What the table says, and the clusters of every stage."""
        left = visual
        for earlier in range(stage + 1):
            kept = self.quota(left, visual, earlier)
            left = kept + (_clusters(left - kept)[1] if self.recycle and left > kept else 0)
        return left

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention received from the raters, mean over the heads that look at the image most."""
        assert view.scores is not None
        if view.scores.ndim == 2:
            return view.scores
        count = max(math.floor(view.scores.shape[1] * self.heads + 0.5), 1)
        mass = view.scores.sum(-1)
        most = ranks(mass, torch.ones_like(mass, dtype=torch.bool)) < count
        return (view.scores * most[..., None]).sum(1) / count

    def select(self, view: View) -> Keep:
        """The best rated; with recycling also the peaks of the clusters, as means of their members."""
        best = super().select(view)
        return best if not self.recycle else self._recycled(view, best.mask)

    def _recycled(self, view: View, kept: Tensor) -> Keep:
        assert view.hidden is not None
        pools = Pools.of(view, self.budget_scope)
        there, x, score = pools.present, pools.split(view.hidden), pools.split(self.score(view))
        stays = pools.split(kept) & there
        numbers = [_clusters(n) if n else (0, 0) for n in (there & ~stays).sum(1).tolist()]
        taken, clusters = torch.tensor(numbers, device=x.device).unbind(1)
        spare = (ranks(score, there & ~stays) < taken[:, None]) & there & ~stays
        peak, member = density_peaks(x, spare, clusters.clamp_min(1))
        peak = peak & spare
        belongs = torch.nn.functional.one_hot(member, x.shape[1]).to(torch.float32) * spare[..., None]
        mean = (belongs.mT @ x.float()) / belongs.sum(1)[..., None].clamp_min(1)
        rows = torch.where(peak[..., None], mean.to(x), x)
        return pools.keep(stays | peak, rows)


def _clusters(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    taken = min(int(RECYCLED * dropped) + 1, dropped)
    return taken, int(taken / CLUSTERED) + 1


def _front(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of True flags of every row in order, padded at the end, and which are there."""
    order = torch.argsort((~flags).long(), dim=1, stable=True)[:, : int(flags.sum(1).max())]
    return order, flags.gather(1, order)


def _taken(hidden: Tensor, columns: Tensor) -> Tensor:
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
