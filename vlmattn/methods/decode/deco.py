"""DeCo: what a preceding layer is sure of is added to the last layer's logits.

Idea: layers before the last few still know what is in the image; among them take the one that is surest of a likely
token, and add its logits, weighted by that probability. Wang et al., "MLLM can see? Dynamic Correction Decoding for
Hallucination Mitigation", arXiv 2410.11779, equations 5 to 8.

Deviations: every sample has its own candidates and layer (the code serves one). The raw logits of a middle layer are
added, as in the code, so that alpha is not comparable between models. alpha = 0 leaves the model alone, the truncation
included (`generate(top_p=0.9, top_k=20)` does that).

Cost: one product with the head a layer and token (`layer_stride=2` halves it, our choice for large vocabularies); no
second branch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import LayerError
from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Calibration, Step

FIRST, LAST, DEPTH = 20, 28, 32
"""The paper's layers, and how many its model has."""


@register("deco", title="MLLM can see? Dynamic Correction Decoding for Hallucination Mitigation", paper="2410.11779")
@dataclass(frozen=True)
class DeCo(Calibration):
    """Add the logits of the preceding layer that is surest of a likely token."""

    alpha: float = param(0.6, "how much of that layer's logits is added, times its probability; 0 changes nothing")
    top_p: float = param(0.9, "the likeliest tokens are candidates until they have this probability together")
    top_k: int = param(20, "at most so many candidates; all other tokens cannot be chosen")
    first_layer: int | None = param(None, "first decoder layer whose input is read; None: the paper's 20 of 32")
    last_layer: int | None = param(None, "last decoder layer whose input is read; None: the paper's 28 of 32")
    layer_stride: int = param(1, "read every layer, or every second, ...")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("alpha", "a finite number >= 0", lambda value: 0 <= value < math.inf)
        self._number("top_p", "a number in (0, 1]", lambda value: 0 < value <= 1)
        self._count("top_k", 1)
        self._count("layer_stride", 1)
        for name in ("first_layer", "last_layer"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise LayerError(f"deco.{name}={value!r} is not a layer: give an int, counting from 0, or None")

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0."""
        return self.alpha == 0

    def disabled(self) -> DeCo:
        """The same correction with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    def lens(self, num_layers: int) -> tuple[int, ...]:
        """First to last layer.

        Raises:
            LayerError: these are no layers of the model.
        """
        first, last = (
            min(math.floor(paper * num_layers / DEPTH + 0.5), num_layers - 1) if given is None else given
            for given, paper in ((self.first_layer, FIRST), (self.last_layer, LAST))
        )
        if not 0 <= first <= last < num_layers:
            raise LayerError(
                f"{self}: layers {first} to {last} are not a range in a model of {num_layers} decoder layers"
            )
        return tuple(range(first, last + 1, self.layer_stride))

    def plausible(self, logits: Tensor) -> Tensor:
        """`(B, q, W)` bool, the candidates."""
        ranked, order = logits.softmax(-1).topk(min(self.top_k, logits.shape[-1]), -1)
        before = ranked.cumsum(-1) - ranked
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < self.top_p)

    def combine(self, step: Step) -> Tensor:
        """`l + alpha * m * l_j`, with j the layer and m its probability of the candidate that any is surest of."""
        assert step.lens is not None
        chances = step.lens.softmax(-1).masked_fill(~self.plausible(step.logits), 0.0).amax(-1)
        surest, layer = chances.max(0)
        preceding = step.lens.gather(0, layer[None, ..., None].expand_as(step.lens[:1]))[0]
        return step.logits + self.alpha * surest[..., None] * preceding
