"""AD-HH: heads that make up objects are cut off from the text when they look at nothing else.

Idea: a few heads, found by ablation, drive hallucinated words; they attend to text and hardly to the image. Where such
a head's row has at least tau of its attention on the text behind the image, these weights are set to 0; the row is not
normalised again. Yang et al., "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular
Attribution and Intervention", ICLR 2025 (OpenReview Bjq4W7P2Us).

Which heads is a fact of a checkpoint: `heads=None` takes the preset of this one (`vlmattn/presets/heads.json`, with its
source), and a checkpoint without a preset is refused. Never take one's list for another's.

Deviations from the released code: a sample is judged by its own row (the code sums over the batch); the image is where
the visual tokens are, not at fixed places, and the text is what follows the last of several images. The token itself
counts as text, as in the code, so that after a short question tau is soon reached. `tau` is 0.4 or 0.5 in the code.
Tokens of a later turn count as generated ones. Finding heads is not part of this method.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from vlmattn.edits import PREFIX, TEXT, AttnEdit, Tags, per_group
from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.base import Editor, LayerView, param, register
from vlmattn.methods.checks import Checks


@register("adhh", title="Modular Attribution and Intervention (Adaptive Deactivation of Hallucination Heads)")
@dataclass(frozen=True)
class ADHH(Checks, Editor):
    """Take text attention from hallucination heads in rows that have much of it."""

    heads: tuple[tuple[int, int], ...] | None = param(
        None, "hallucination heads as (layer, query head); None: the checkpoint's preset"
    )
    tau: float = param(0.4, "heads are cut off where text has at least this mass; above 1 nothing changes")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("tau", "a number >= 0", lambda value: value >= 0)
        if self.heads is not None:
            object.__setattr__(self, "heads", self._pairs(self.heads))

    def _pairs(self, given: Any) -> tuple[tuple[int, int], ...]:
        pairs = (
            [tuple(pair) for pair in given]
            if isinstance(given, list | tuple) and all(isinstance(pair, list | tuple) for pair in given)
            else None
        )
        if pairs is None or not all(len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in pairs):
            raise SpecError(f"adhh.heads={given!r}: expected pairs of layer and head such as [(16, 29), (26, 9)]")
        return tuple((pair[0], pair[1]) for pair in pairs)

    @property
    def needs(self) -> frozenset[str]:
        """The checkpoint's heads, unless they are given."""
        return frozenset() if self.heads is not None else frozenset({"head_list"})

    @property
    def is_noop(self) -> bool:
        """True where no head can be cut off."""
        return self.heads == () or self.tau > 1

    def disabled(self) -> ADHH:
        """The same edit of no head."""
        return dataclasses.replace(self, heads=())

    def layers(self, num_layers: int) -> list[int]:
        """The layers with hallucination heads.

        Raises:
            LayerError: the model has no such layer.
        """
        layers = sorted({layer for layer, _ in self.heads or ()})
        if layers and layers[-1] >= num_layers:
            raise LayerError(f"{self}: layer {layers[-1]} does not exist, this model has {num_layers} decoder layers")
        return layers

    def tags(self, view: LayerView) -> Tags:
        """The text behind the last image apart from other text."""
        other = view.real & ~view.visual & ~view.after
        return Tags(torch.where(other, PREFIX, view.tag).to(torch.uint8), view.visual.any(1))

    def edit(self, layer: int) -> AttnEdit:
        """No text for the heads of this layer, from tau on."""
        return AttnEdit(
            coefficient=per_group(1.0, {TEXT: 0.0}),
            min_mass=per_group(0.0, {TEXT: self.tau}),
            heads=tuple(sorted({head for place, head in self.heads or () if place == layer})),
            rows="last",
        )
