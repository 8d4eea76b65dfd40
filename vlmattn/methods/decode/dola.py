"""DoLa: what an early layer would say already is subtracted.

Idea: facts enter the prediction in late layers; read earlier layers through the final norm and the head, take the one
whose prediction is farthest from the last layer's, and subtract its log-probabilities. Chuang et al., "DoLa: Decoding
by Contrasting Layers Improves Factuality in Large Language Models", arXiv 2309.03883. A method for text models; on
vision-language models published numbers show no gain, and it is here as a baseline.

Deviations: every token of every sample has its own early layer (the code takes one a batch); the divergence is the
paper's (the code's has the arguments of both parts exchanged); a repetition penalty is left to `generate`. Layer 0 is
the embeddings, which say little where they are tied to the head.

Cost: one product with the head a candidate layer and token; no second branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Calibration, Step

HALVES = ("low", "high")


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities `(..., W)`."""
    mean = torch.logaddexp(one, other) - torch.log(torch.tensor(2.0, device=one.device))
    parts = [(log.exp() * (log - mean)).sum(-1) for log in (one, other)]
    return (parts[0] + parts[1]) / 2


@register(
    "dola",
    title="DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
    paper="2309.03883",
)
@dataclass(frozen=True)
class DoLa(Calibration):
    """Subtract the log-probabilities of the early layer that differs most from the last."""

    layers: str | Sequence[int] = param(
        "high", "decoder layers whose inputs are candidates: even ones of the 'low' or 'high' half, or a list"
    )
    beta: float = param(0.1, "tokens below this share of the largest probability cannot be chosen; 0: all can")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._check_beta()
        if isinstance(self.layers, str):
            self._one_of("layers", HALVES)
            return
        if not isinstance(self.layers, Sequence) or not self.layers:
            raise SpecError(f"dola.layers={self.layers!r}: expected 'low', 'high' or a list of layers")
        if not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise LayerError(f"dola.layers={self.layers!r}: give ints, counting from 0")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def disabled(self) -> None:
        """Nothing: it has no strength."""

    def lens(self, num_layers: int) -> tuple[int, ...]:
        """The candidates.

        Raises:
            LayerError: the model has no such layer; the last layer's output is what they are compared with.
        """
        half = num_layers // 2
        if self.layers == "low":
            return tuple(range(0, half, 2))
        if self.layers == "high":
            return tuple(range(half + half % 2, num_layers, 2))
        if max(map(int, self.layers)) >= num_layers:
            raise LayerError(f"{self}: this model has the inputs of {num_layers} decoder layers, 0 to {num_layers - 1}")
        return tuple(map(int, self.layers))

    def combine(self, step: Step) -> Tensor:
        """The last layer's log-probabilities without those of the layer farthest from it."""
        assert step.lens is not None
        last, early = step.logits.log_softmax(-1), step.lens.log_softmax(-1)
        farthest = divergence(last.expand_as(early), early).argmax(0)
        return last - early.gather(0, farthest[None, ..., None].expand_as(early[:1]))[0]
