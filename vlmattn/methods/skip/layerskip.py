"""Layer skipping: the most redundant decoder layers outside a protected "visual region" are left out.

Idea: a sparse, uniform quarter of the decoder layers carries the visual abilities, so that of the other layers those
can go that change their input least. Wang et al., "Activating Distributed Visual Region within LLMs for Efficient and
Effective Vision-Language Training and Inference", arXiv 2412.12785.

EXPERIMENTAL: the paper leaves layers out after a training that targets the region. On a checkpoint as it is it reports
that leaving out even one layer hurts visual tasks strongly; none of its figures hold here. Start with one layer.

Deviations and choices: the released code has no layer dropping, so that the rule is the paper's text; the region is
round(i * L / n), n = round(L / 4), or one of the paper's two lists for 32 layers, which differ by one; the first and
last layer stay; positions are untouched. Which layers are redundant must be measured once on the checkpoint:
`vlmattn layers --model ORG/MODEL`, or `vlmattn.layers.layer_scores`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.base import param, register
from vlmattn.methods.skipper import Skipper

REGIONS = {"paper": (0, 4, 8, 12, 18, 22, 26, 30), "code": (1, 5, 9, 13, 19, 23, 27, 31)}
"""The visual regions in 32 layers, as the paper prints and as its code defaults them."""


def visual_region(num_layers: int) -> tuple[int, ...]:
    """A sparse, uniform quarter of the layers: round(i * L / n) for i below n = max(1, round(L / 4))."""
    count = max(1, math.floor(num_layers / 4 + 0.5))
    return tuple(math.floor(i * num_layers / count + 0.5) for i in range(count))


def least_changing(
    scores: Sequence[float], count: int, protected: Collection[int], adjacent: bool = True
) -> tuple[int, ...]:
    """The layers with the lowest scores, ascending; of equal ones the lower layer goes first.

    Args:
        scores: one a layer, lower is more redundant.
        count: how many to leave out.
        protected: layers that stay; the first and the last stay anyway.
        adjacent: whether neighbours may both go.

    Raises:
        LayerError: there are not so many to choose from.
    """
    candidates = [layer for layer in range(1, len(scores) - 1) if layer not in protected]
    chosen: list[int] = []
    for layer in sorted(candidates, key=lambda layer: (scores[layer], layer)):
        if len(chosen) < count and (adjacent or not {layer - 1, layer + 1} & set(chosen)):
            chosen.append(layer)
    if len(chosen) < count:
        how = "" if adjacent else " none of which are neighbours"
        raise LayerError(
            f"{count} of {len(scores)} layers cannot be left out: only {len(chosen)} can, outside the protected "
            f"{sorted(protected)} and the first and last layer{how}"
        )
    return tuple(sorted(chosen))


@register(
    "layerskip",
    title="Activating Distributed Visual Region within LLMs (layer pruning; experimental)",
    paper="2412.12785",
)
@dataclass(frozen=True)
class LayerSkip(Skipper):
    """Leave out decoder layers, given or chosen by their redundancy outside a protected region (experimental)."""

    caution: ClassVar[str] = (
        "is experimental: the paper leaves layers out after a training that targets the others; without it expect "
        "visible losses"
    )

    layers: tuple[int, ...] | None = param(None, "the layers to leave out; None: the n_drop lowest of `scores`")
    scores: tuple[float, ...] | None = param(
        None, "one a layer, lower goes first, as `vlmattn layers` measures them on the checkpoint"
    )
    n_drop: int = param(1, "how many layers `scores` leaves out")
    region: tuple[int, ...] | str | None = param(
        None, "layers that `scores` must not leave out; None: a sparse quarter, 'paper' or 'code': their 32-layer lists"
    )
    adjacent: bool = param(True, "whether `scores` may leave out neighbouring layers")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("layers", "region"):
            value = getattr(self, name)
            if value is None or (name == "region" and isinstance(value, str) and value in REGIONS):
                continue
            if not isinstance(value, list | tuple) or not all(type(n) is int and n >= 0 for n in value):
                raise LayerError(f"layerskip.{name}={value!r}: expected decoder layers such as [5, 9], counting from 0")
            object.__setattr__(self, name, tuple(sorted(set(value))))
        if self.layers and self.layers[0] == 0:
            raise LayerError(
                f"layerskip.layers={list(self.layers)}: layer 0 must stay, its cache tells how long the conversation is"
            )
        self._check_scores()
        self._count("n_drop", 0)
        self._flag("adjacent")
        if self.layers is not None and dataclasses.replace(self, layers=None) != type(self)():
            raise SpecError(f"{self}: scores, n_drop, region and adjacent do nothing beside layers: leave them out")

    def _check_scores(self) -> None:
        if self.scores is None:
            return
        if not isinstance(self.scores, list | tuple) or not all(_finite(score) for score in self.scores):
            raise SpecError(f"layerskip.scores={self.scores!r}: expected a number for each decoder layer")
        object.__setattr__(self, "scores", tuple(map(float, self.scores)))

    @property
    def is_noop(self) -> bool:
        """True if no layer is left out."""
        return not self.layers if self.layers is not None else self.n_drop == 0

    def disabled(self) -> LayerSkip:
        """The same with no layer."""
        return LayerSkip(layers=())

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """The given layers, or the lowest scores outside the region.

        Raises:
            LayerError: the model has no such layers, or too few to choose from.
            SpecError: nothing says which.
        """
        if self.is_noop:
            return ()
        if self.layers is not None:
            if self.layers[-1] >= num_layers:
                raise LayerError(f"{self}: this model has {num_layers} decoder layers, counting from 0")
            return self.layers
        if self.scores is None:
            raise SpecError(
                f"{self}: which layers are redundant differs from model to model: run `vlmattn layers --model NAME`, "
                "and give what it finds as layerskip(layers=[...])"
            )
        if len(self.scores) != num_layers:
            raise LayerError(f"{self}: {len(self.scores)} scores do not fit a model of {num_layers} decoder layers")
        return least_changing(self.scores, self.n_drop, self.protected(num_layers), self.adjacent)

    def protected(self, num_layers: int) -> tuple[int, ...]:
        """The visual region in a model of `num_layers` layers.

        Raises:
            LayerError: the model has no such layers.
        """
        if self.region is None:
            return visual_region(num_layers)
        if isinstance(self.region, str) and num_layers != 32:
            raise LayerError(f"{self}: region={self.region!r} is a list for 32 layers, this model has {num_layers}")
        region = REGIONS[self.region] if isinstance(self.region, str) else self.region
        if region and region[-1] >= num_layers:
            raise LayerError(f"{self}: region {list(region)} does not fit a model of {num_layers} decoder layers")
        return region


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
