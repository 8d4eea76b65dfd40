"""SID: what the model says when it sees only the visual tokens it looks at least is subtracted.

Idea: amplify hallucination from the inside: in a second branch the layers behind the first few see only the visual
tokens that got least attention, chosen anew by every token; contrast with it. Huo et al., "Self-Introspective Decoding:
Alleviating Hallucinations for Large Vision-Language Models", arXiv 2408.02032.

Deviations: the cutoff holds for greedy decoding as well (the code leaves it out there; beta = 0 does so); every sample
and image has its own choice (the code takes that of sample 0); one row of one layer is computed instead of eager
attention in all. The code keeps 100 of 576 tokens for POPE and 50 for captions, and its alpha of 1 is not handed on, so
that 0.5 is in force. alpha = 0 leaves the model alone, the cutoff included.

`frozen`: the choice of the last prompt token holds for the whole answer and the others leave the second branch's cache,
which is faster. Cost otherwise: a second prefill, twice the keys and values; both branches decode in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.errors import LayerError
from vlmattn.methods.base import Attention, Pruner, View, param, register
from vlmattn.methods.calibrate import Branch, Contrast, Hide


@dataclass(frozen=True)
class LeastAttended(Pruner):
    """Keeps the visual tokens that the last prompt token attends to least."""

    name: ClassVar[str] = "sid"
    paper_layers: ClassVar[tuple[int, ...]] = (2,)
    min_layer: ClassVar[int] = 1

    @property
    def attention(self) -> Attention:
        """Of the last prompt token, in the layer before."""
        return Attention("last")

    def score(self, view: View) -> Tensor:
        """`(B, V)` the less attention the higher."""
        assert view.scores is not None
        return -view.scores

    def hidden(self, given: Tensor, visual: Tensor) -> Tensor:
        """`(B, q, N)` bool, all visual columns but those that each row looks at least; see `Hide`."""
        counts = [budget.count(n, self.keep) if n else 0 for n in visual.sum(1).tolist()]
        wanted = torch.tensor(counts, device=given.device)[:, None, None]
        order = given.masked_fill(~visual[:, None], torch.inf).argsort(dim=-1, stable=True)
        rank = torch.arange(given.shape[-1], device=given.device).expand_as(order)
        return visual[:, None] & (torch.zeros_like(order).scatter(2, order, rank) >= wanted)


@register(
    "sid",
    title="Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models",
    paper="2408.02032",
)
@dataclass(frozen=True)
class SID(Contrast):
    """Subtract the logits that the model has when it sees only the visual tokens it looks at least."""

    alpha: float = param(0.5, "how much of the second branch is subtracted; 0 changes nothing")
    keep: float | int = param(0.1736, "share (float) or number (int) of a prompt's visual tokens that it sees")
    before_layer: int | None = param(
        None, "0-indexed decoder layer from which on it sees no others; None: the paper's 2 of 32 at this depth"
    )
    frozen: bool = param(False, "choose once, at the last prompt token, instead of at every token")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._flag("frozen")
        if isinstance(self.before_layer, (tuple, list)):
            raise LayerError(f"sid.before_layer={self.before_layer!r}: give one layer, or None for the paper's")
        self._selector()

    def _selector(self) -> LeastAttended:
        return LeastAttended(keep=self.keep, before_layer=self.before_layer, budget_scope="sample")

    @property
    def branch(self) -> Branch:
        """The same prompt, of which later layers see the least attended visual tokens."""
        selector = self._selector()
        if self.frozen:
            return Branch(selector=selector)
        return Branch(hide=Hide(selector.resolve_layer, selector.hidden))
