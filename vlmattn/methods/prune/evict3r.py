"""Evict3R for the caches of vision-language models: keys that images hardly looked at go, layer by layer.

Idea: when frames stream in, each layer adds up how much attention its keys receive from every new frame; a layer whose
attention is flat gets a larger budget, and after each frame the keys with the least attention per frame go. Evict3R is
a method for a streaming 3-D reconstruction transformer: Mahdi et al., "Evict3R: Training-Free Token Eviction for
Memory-Bounded Streaming Visual Geometry Transformers", arXiv 2509.17650. **What is here is our transfer to
vision-language models; the paper claims nothing about it.**

The chunks of a prompt are its images, or the frames of a video. After each chunk, in each layer, with the K visual keys
that are left: `a`, the attention that they receive from the rows of the chunk, mean over heads, scaled to sum 1;
received += a * K; exposure += 1; score = received / exposure. Budgets: `alpha = softmax over layers of -K^2 var(a) /
temperature`; each layer gets `L * B * alpha` tokens, at least `floor` and at most all, in whole numbers that sum to
L * B, where B are the visual tokens that `keep` says. The lowest scores go until the budget holds.

Only visual keys go: text, separators and the anchor stay. The anchor is the given share of the first chunk, its best
tokens; it counts in the budget. By default a video's first frame is protected whole and nothing of unrelated images.

Deviations from the paper: all chunks went through the prefill together, and the rule is applied to them in order after
it, so that a chunk's own attention was computed with nothing evicted and is scaled anew to the keys that are left; no
image may come in a later turn. Budgets are of visual tokens and absolute, the number of frames need not be known; the
variance is free of scale; the attention of every chunk counts alike, whatever its size. Sums are fp32 (fp16 in the
code, where large ones overflow and protect for good); no more than the unprotected keys go; keys are evicted as
rotated, with their positions; something is evicted after the first and the last chunk too. `rows=text` takes the rows
behind the last image instead of the chunk's own, which is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Eviction, Keep
from vlmattn.methods.base import param, register
from vlmattn.methods.cache import Evictor
from vlmattn.methods.views import CacheView, Watch


def layer_shares(variance: Tensor, temperature: float) -> Tensor:
    """`(..., L)` shares of the layers, sum 1: `softmax(-variance / temperature)`."""
    return (-variance.double() / temperature).softmax(-1)


def layer_budgets(shares: Tensor, per_layer: Tensor, floor: int, most: Tensor) -> Tensor:
    """Whole tokens for each layer: `L * per_layer` shared out by `shares`, between a least and a most.

    Args:
        shares: `(B, L)` of the layers, sum 1.
        per_layer: `(B,)` long, tokens per layer on average.
        floor: the fewest of a layer, but never more than the average.
        most: `(B, L)` long, visual tokens that the layers have.

    Returns:
        `(B, L)` long with `sum = L * per_layer`, or `most` where that is less. What bounds give or take is taken from
        or given to the other layers in proportion. Fractions are given to the largest first, of equal ones to the lower
        layer.
    """
    shares = shares.double().clamp_min(1e-12)
    total = torch.minimum(shares.shape[-1] * per_layer, most.sum(-1))[:, None].double()
    least = torch.minimum(per_layer[:, None].clamp_max(floor), most)
    low, high = torch.zeros_like(total), torch.full_like(total, 2.0) * total / shares.amin(-1, keepdim=True)
    exact = (total * shares).clamp(least, most)
    if bool((exact.sum(-1, keepdim=True) - total).abs().gt(1e-9).any()):
        for _ in range(200):  # the factor of the shares, by bisection; doubles have no more digits
            factor = (low + high) / 2
            exact = (factor * shares).clamp(least, most)
            over = exact.sum(-1, keepdim=True) > total
            low, high = torch.where(over, low, factor), torch.where(over, factor, high)
    whole = (exact + 1e-9).floor()
    rank = (whole - exact).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (whole + (rank < total - whole.sum(-1, keepdim=True))).long()


@dataclass
class Stream:
    """The visual keys of one layer while chunks arrive.

    Attributes:
        left: `(B, S)` bool, keys that arrived and were not evicted.
        received: `(B, S)` fp32, attention received, times the number of keys, in sum over chunks.
        exposure: `(B, S)` fp32, chunks that the key was there for.
        anchor: `(B, S)` bool, keys that are protected.
    """

    left: Tensor
    received: Tensor
    exposure: Tensor
    anchor: Tensor

    @property
    def score(self) -> Tensor:
        """`(B, S)` attention received per chunk; the anchor's is infinite."""
        return (self.received / self.exposure.clamp_min(1)).masked_fill(self.anchor, torch.inf)

    def add(self, fresh: Tensor, attention: Tensor) -> Tensor:
        """A chunk arrives: the keys `fresh` `(B, S)`, and what all keys receive from it, `(B, S)`.

        Returns:
            `(B,)` fp64, the variance of attention over the keys, times their number squared; samples without fresh keys
            are left as they are.
        """
        active = fresh.any(1, keepdim=True)
        self.left = self.left | fresh
        count = self.left.sum(1, keepdim=True)
        share = attention.double() * self.left
        share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        spread = (share - 1 / count.clamp_min(1)) * self.left
        self.received = self.received + (share * count * active).float()
        self.exposure = self.exposure + (self.left & active)
        return (spread.square().sum(1, keepdim=True) * count)[:, 0]

    def evict(self, limit: Tensor) -> None:
        """Let the lowest scores go until no more than `limit` `(B,)` long are left, or only the anchor."""
        protected = (self.left & self.anchor).sum(1)
        stay = torch.maximum(limit, protected)
        best = Keep.top(self.score, torch.where(self.left, 0, -1), stay[:, None]).mask
        self.left = self.left & best


@register("evict3r", title="Evict3R's streaming eviction, transferred to VLM caches", paper="2509.17650")
@dataclass(frozen=True)
class Evict3R(Evictor):
    """Let the visual keys go that received least attention from the images and frames of the prompt, in order."""

    keep: float | int = param(0.5, "visual tokens that stay per layer, on average: share (or number) of the prompt's")
    temperature: float = param(1.0, "how little budgets follow the variance of attention; large: all layers alike")
    anchor: float | None = param(None, "share of the first image or frame that stays; None: 1 of a video, 0 of images")
    floor: int = param(16, "fewest visual tokens of a layer's budget, where the average is not less")
    rows: str = param("chunk", "whose attention counts: of each 'chunk' (image or frame), or of the 'text' behind all")

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            BudgetError, SpecError: a parameter is out of range.
        """
        budget.check(self.keep, "evict3r.keep")
        self._number("temperature", "a number above 0", lambda x: 0 < x < float("inf"))
        if self.anchor is not None:
            self._number("anchor", "a number in [0, 1], or None", lambda x: 0 <= x <= 1)
        self._count("floor", 1)
        self._one_of("rows", ("chunk", "text"))

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`: budgets hold every token."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def disabled(self) -> Evict3R:
        """The same method with `keep=1.0`."""
        return replace(self, keep=1.0)

    @property
    def adaptive(self) -> bool:
        """Budgets of the layers follow the attention to the image."""
        return True

    @property
    def watched(self) -> Mapping[str, Watch]:
        """The sum over the rows of each chunk, or over the text behind the last image."""
        return {"received": Watch("chunks" if self.rows == "chunk" else "after", total=True)}

    def evict(self, layers: Sequence[CacheView]) -> list[Eviction]:
        """The chunks in order: attention, budgets, eviction in every layer."""
        streams = [self._start(view) for view in layers]
        sizes = torch.tensor(
            [sum(span.length for span in row) for row in layers[0].spans], device=layers[0].real.device
        )
        mean = torch.tensor([budget.count(n, self.keep) if n else 0 for n in sizes.tolist()], device=sizes.device)
        most = torch.stack([view.visual.sum(1) for view in layers], -1)
        chunks = max(int(view.chunk.max()) for view in layers) + 1
        for chunk in range(chunks):
            fresh = [view.chunk == chunk for view in layers]
            seen = [self._received(view, chunk) for view in layers]
            spread = [stream.add(*pair) for stream, *pair in zip(streams, fresh, seen, strict=True)]
            shares = layer_shares(torch.stack(spread, -1), self.temperature)
            limits = layer_budgets(shares, mean, self.floor, most)
            for place, (stream, new) in enumerate(zip(streams, fresh, strict=True)):
                arrived = new.any(1)
                stream.evict(torch.where(arrived, limits[:, place], stream.left.sum(1)))
        return [
            Eviction(~view.visual | stream.left, None, {"received": stream.received, "exposure": stream.exposure})
            for view, stream in zip(layers, streams, strict=True)
        ]

    def _received(self, view: CacheView, chunk: int) -> Tensor:
        received = view.scores["received"]
        return received[:, chunk] if self.rows == "chunk" else received

    def _start(self, view: CacheView) -> Stream:
        """A layer before the first chunk, with its anchor: the best of the chunk by its own attention."""
        none = torch.zeros_like(view.scores["received"][:, 0] if self.rows == "chunk" else view.scores["received"])
        shares = [self._anchored(row) for row in view.spans]
        first = view.chunk == 0
        present = first.sum(1)
        counts = (present * torch.tensor(shares, dtype=torch.float64, device=present.device) + 0.5).floor().long()
        anchor = Keep.top(self._received(view, 0), torch.where(first, 0, -1), counts[:, None]).mask
        return Stream(torch.zeros_like(view.visual), none, none.clone(), anchor)

    def _anchored(self, spans: Sequence[object]) -> float:
        """The share of the first chunk of a sample that is protected."""
        if self.anchor is not None:
            return float(self.anchor)
        grid = getattr(spans[0], "grid", None) if spans else None
        return 1.0 if grid is not None and grid[0] > 1 else 0.0

    def cached(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """What the budgets are on average; a layer that had less after an earlier chunk stays below its own."""
        return budget.count(visual, self.keep)
