"""MemVR: a layer that is unsure is shown the image once more.

Idea: read every early layer through the head; where the ten best tokens of the last position are nearly equally likely,
mix what the hidden states find among the projected visual tokens into the next layer's feed-forward network. Zou et
al., "Look Twice Before You Answer: Memory-Space Visual Retracing for Hallucination Mitigation in Multimodal Large
Language Models", arXiv 2410.03577.

Deviations: every sample has its own entropy, layer and scale (the code takes them over the batch); at prefill the scale
is over the prompt's own rows, without padding; all images of a prompt are looked at (the code: the last one). The code
scales the visual tokens by the mean weights of the network, which the later scaling to the network's output undoes, so
that it is left out. The ratio is tuned per benchmark in the code (0.12 for MME, 0.31 for captions).

Cost: one product with the head a candidate layer and token; no second branch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import LayerError
from vlmattn.methods.base import param, register
from vlmattn.methods.memory import Retracing

FIRST, LAST, DEPTH = 7, 16, 32
"""The paper's layers, and how many its model has."""
BEST = 10


def uncertainty(logits: Tensor) -> Tensor:
    """`(...)` fp32 in [0, 1], the entropy of the ten largest of the logits `(..., W)`, over its largest value."""
    best = logits.float().topk(min(BEST, logits.shape[-1]), -1).values.log_softmax(-1)
    return -(best.exp() * best).sum(-1) / math.log(best.shape[-1])


@register(
    "memvr",
    title="Look Twice Before You Answer: Memory-Space Visual Retracing for Hallucination Mitigation in MLLMs",
    paper="2410.03577",
)
@dataclass(frozen=True)
class MemVR(Retracing):
    """Mix the visual tokens into the feed-forward network behind the first layer that is unsure."""

    ratio: float = param(0.12, "share of the mixture that is looked up among the visual tokens; 0 changes nothing")
    theta: float = param(0.75, "a layer is unsure above this entropy, in [0, 1]; negative: always")
    first_layer: int | None = param(None, "first decoder layer that may be mixed; None: the paper's 7 of 32")
    last_layer: int | None = param(None, "last decoder layer that may be mixed; None: the paper's 16 of 32")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("ratio", "a share in [0, 1]", lambda value: 0 <= value <= 1)
        self._number("theta", "a finite number", math.isfinite)
        for name in ("first_layer", "last_layer"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise LayerError(f"memvr.{name}={value!r}: give an int >= 1 (the layer before is unsure), or None")

    @property
    def is_noop(self) -> bool:
        """True where nothing is mixed, or no layer can be unsure."""
        return self.ratio == 0 or self.theta >= 1

    def disabled(self) -> MemVR:
        """The same with ratio = 0."""
        return dataclasses.replace(self, ratio=0.0)

    def layers(self, num_layers: int) -> range:
        """First to last layer that may be mixed."""
        first, last = (
            max(math.floor(paper * num_layers / DEPTH + 0.5), 1) if given is None else given
            for given, paper in ((self.first_layer, FIRST), (self.last_layer, LAST))
        )
        if not first <= last < num_layers:
            raise LayerError(
                f"{self}: layers {first} to {last} are not a range in a model of {num_layers} decoder layers"
            )
        return range(first, last + 1)

    def unsure(self, logits: Tensor) -> Tensor:
        """Where the ten best tokens are nearly equally likely."""
        return uncertainty(logits) > self.theta

    def mixed(self, entering: Tensor, leaving: Tensor, memory: Tensor, together: Tensor) -> Tensor:
        """`(1 - r) FFN(x) + r R(x)`, with `R(x) = x Z^T Z` at the size of `FFN(x)`; see `Retracing.mixed`."""
        wide, own = entering.float(), leaving.float()
        found = wide @ memory.float().mT @ memory.float()
        sizes = [self._size(x, together) for x in (own, found)]
        retraced = found * (sizes[0] / sizes[1].clamp_min(1e-30))
        mixture = (1 - self.ratio) * own + self.ratio * retraced
        return torch.where(sizes[1] > 0, mixture, own).to(leaving)

    @staticmethod
    def _size(x: Tensor, together: Tensor) -> Tensor:
        """`(B, M, 1)` the mean absolute value: over the rows that stand together, or of the row alone."""
        each = x.abs().mean(-1)
        rows = together.to(each)
        joint = (each * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp_min(1)
        return torch.where(together, joint, each)[..., None]
