"""What a method may implement and what it may see.

A method is a frozen dataclass whose fields are the paper's hyper-parameters. `register` puts it under its name into the
registry, and with that into the spec language, the CLI, the README table and the contract tests.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import AttnEdit, Keep, Tags
from vlmattn.errors import LayerError, SpecError
from vlmattn.spans import Span

REGISTRY: dict[str, type[Method]] = {}

M = TypeVar("M", bound="type[Method]")


def param(default: Any, help: str) -> Any:
    """A dataclass field with its default and one line of help for the CLI and the docs."""
    return dataclasses.field(default=default, metadata={"help": help})


def register(name: str, *, title: str, paper: str = "") -> Callable[[M], M]:
    """Class decorator: put a method class into the registry.

    Args:
        name: the name in specs, such as `fastv`.
        title: the paper's or the baseline's title.
        paper: arXiv id, or empty.

    Raises:
        SpecError: another class has this name already.
    """

    def add(cls: M) -> M:
        known = REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"method name {name!r} belongs to {known.__module__}.{known.__qualname__}: choose another")
        cls.name, cls.title, cls.paper = name, title, paper
        REGISTRY[name] = cls
        return cls

    return add


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What the engine must compute for this method; see `View`."""
        return frozenset()

    @property
    def is_noop(self) -> bool:
        """True if these parameters leave the model exactly as it is, so that nothing need be installed."""
        return False

    def disabled(self) -> Method | None:
        """The same method with its strength at the value that changes nothing; None if it has no strength, so that only
        leaving it out (None is a spec of nothing) disables it."""
        raise NotImplementedError(f"{type(self).__name__} must implement disabled()")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """Visual tokens in each decoder layer for one image, without running a model; methods that drop none: all.

        Args:
            visual: visual tokens that the image has, 0 or more.
            num_layers: decoder layers of the model.
            grid: `(t, h, w)` of the image's visual tokens; only methods that look at it need it, and where it is None
                they assume one frame as near to a square as `visual` allows.

        Returns:
            `num_layers` ints: what `session.report().visual_per_layer` has for a prompt with this one image.

        Raises:
            LayerError: the method does not fit this depth.
            CallError: the method does not fit this grid.
        """
        return [visual] * num_layers

    def __str__(self) -> str:
        shown = [
            f"{field.name}={_literal(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default or type(getattr(self, field.name)) is not type(field.default)
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def _literal(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


@dataclass(frozen=True)
class View:
    """What a pruner sees of a batch just before decoder layer `layer`: visual tokens only, in order, padded at the end.

    Attributes:
        layer: the decoder layer whose input is pruned; 0 is the entry of the text model.
        image: `(B, V)` long, index of the image within the sample, -1 at padding.
        counts: `(B, G)` long, visual tokens of each image.
        spans: per sample the spans as they stood in the prompt.
        index: `(B, V)` long, index of the token within its image as it stood in the prompt.
        hidden: `(B, V, C)` the visual rows of the layer input, in the model's dtype; None if `layer_input` is not
            needed.
        scores: `(B, V)` fp32, attention received (mean over heads, probabilities over all keys) in layer `layer - 1`
            from
            the rows that `needs` names: `last_row_scores`, `text_row_scores` or `all_row_scores`; None if not asked
                for.
        keys: per sample and image an int that depends only on the sample's text and the image's pixels, for
            reproducible draws whatever the batch; None if `content_key` is not needed.
    """

    layer: int
    image: Tensor
    counts: Tensor
    spans: tuple[tuple[Span, ...], ...]
    index: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None
    keys: tuple[tuple[int, ...], ...] | None = None


SCOPES = ("image", "sample")


class Selector(Method):
    """Decides which visual tokens stay before one decoder layer.

    A subclass is a frozen dataclass with a field `before_layer` and implements `select` and `left`. Most methods keep a
    share or a number of the tokens: they start from `Pruner`.
    """

    kind: ClassVar[str] = "prune"
    paper_layer: ClassVar[int] = 0
    paper_depth: ClassVar[int] = 32
    min_layer: ClassVar[int] = 0

    before_layer: int | None

    def __post_init__(self) -> None:
        """Validate `before_layer`.

        Raises:
            LayerError: it is no layer, or too early for this method.
        """
        layer = self.before_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
            raise LayerError(f"{self.name}.before_layer={layer!r} is not a layer: give an int, or None for the paper's")
        if layer is not None and layer < self.min_layer:
            why = "" if self.min_layer == 0 else " (it scores with the attention of the layer before)"
            raise LayerError(
                f"{self.name}.before_layer={layer} is too early: the first possible is {self.min_layer}{why}"
            )

    def resolve_layer(self, num_layers: int) -> int:
        """The decoder layer to prune before, in a model of `num_layers` layers.

        Raises:
            LayerError: the model has no such layer.
        """
        if self.before_layer is None:
            scaled = math.floor(self.paper_layer * num_layers / self.paper_depth + 0.5)
            return min(max(scaled, self.min_layer), num_layers - 1)
        if self.before_layer >= num_layers:
            raise LayerError(
                f"{self}: this model has {num_layers} decoder layers, before_layer must be between {self.min_layer} "
                f"and {num_layers - 1}"
            )
        return self.before_layer

    def select(self, view: View) -> Keep:
        """The tokens that stay."""
        raise NotImplementedError(f"{type(self).__name__} must implement select(view)")

    def left(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """How many of the `visual` tokens of an image stay; `grid` as in `expected_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must implement left(visual, grid)")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """All visual tokens up to `before_layer`, from there on those that are left."""
        first = self.resolve_layer(num_layers)
        kept = self.left(visual, grid) if visual and not self.is_noop else visual
        return [visual if layer < first else kept for layer in range(num_layers)]


@dataclass(frozen=True)
class Pruner(Selector):
    """Keeps a part of the visual tokens before one decoder layer.

    A subclass implements `score` (higher stays; equal scores: the lower index stays) or `select`. The base resolves
    budgets, order, several images and unequal rows. A `select` that keeps other numbers than `keep` says comes with a
    `left` that tells them.

    Raises:
        BudgetError, LayerError, SpecError: a parameter is out of range.
    """

    keep: float | int = param(0.5, "share (float in (0, 1]) or number (int) of the arriving visual tokens that stays")
    before_layer: int | None = param(
        None, "0-indexed decoder layer whose input is pruned (0: before the LLM); None: the paper's layer at this depth"
    )
    budget_scope: str = param(
        "image", "'image': the budget holds for every image; 'sample': for all images of a prompt"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        budget.check(self.keep, f"{self.name}.keep")
        if self.budget_scope not in SCOPES:
            raise SpecError(f"{self.name}.budget_scope={self.budget_scope!r}: expected one of {', '.join(SCOPES)}")
        super().__post_init__()

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def disabled(self) -> Pruner:
        """The same pruner with `keep=1.0`."""
        return dataclasses.replace(self, keep=1.0)

    def score(self, view: View) -> Tensor:
        """`(B, V)` float, higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must implement score(view) or select(view)")

    def select(self, view: View) -> Keep:
        """The tokens that stay; the default ranks `score` within every image."""
        group, counts = self.groups(view)
        return Keep.top(self.score(view), group, counts)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """The budget of one image."""
        return budget.count(visual, self.keep)

    def groups(self, view: View) -> tuple[Tensor, Tensor]:
        """`(B, V)` the budget group of every token and `(B, G)` how many of each group stay."""
        if self.budget_scope == "sample":
            group, present = view.image.clamp_max(0), view.counts.sum(1, keepdim=True)
        else:
            group, present = view.image, view.counts
        kept = [[budget.count(n, self.keep) if n else 0 for n in row] for row in present.tolist()]
        return group, torch.tensor(kept, dtype=torch.long, device=view.image.device)


@dataclass(frozen=True)
class LayerView:
    """What an editor sees of a prompt when it enters a decoder layer, after pruning.

    Attributes:
        hidden: `(B, S, C)` the layer's input, in the model's dtype.
        visual: `(B, S)` bool.
        real: `(B, S)` bool, False at padding.
        sink_dims: hidden dimensions that carry massive activations in this checkpoint; None if `sink_dims` is not
            needed.
    """

    hidden: Tensor
    visual: Tensor
    real: Tensor
    sink_dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Editor(Method):
    """Edits attention in some decoder layers."""

    kind: ClassVar[str] = "attend"

    def layers(self, num_layers: int) -> range:
        """The decoder layers that are edited."""
        raise NotImplementedError(f"{type(self).__name__} must implement layers(num_layers)")

    def tags(self, view: LayerView) -> Tags:
        """Groups of the prompt's keys in one layer, once per prompt; generated tokens are text."""
        raise NotImplementedError(f"{type(self).__name__} must implement tags(view)")

    def edit(self) -> AttnEdit:
        """The edit, the same in every layer."""
        raise NotImplementedError(f"{type(self).__name__} must implement edit()")


@dataclass(frozen=True)
class HeadGain(Method):
    """Scales the outputs of some heads in some decoder layers, chosen per sample at the last prompt token."""

    kind: ClassVar[str] = "attend"

    def layers(self, num_layers: int) -> list[int]:
        """The decoder layers whose heads are scaled."""
        raise NotImplementedError(f"{type(self).__name__} must implement layers(num_layers)")

    def gain(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the heads.

        Args:
            image: `(B, H, D)` fp32 head outputs with the image.
            text: `(B, H, D)` the same without it.

        Returns:
            `(B, H)` fp32 factors, and `(B, H)` the statistic they were chosen by.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement gain(image, text)")
