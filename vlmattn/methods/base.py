"""What a method may implement and what it may see.

A method is a frozen dataclass of the paper's hyper-parameters. `register` puts it under its name into the registry, and
with that into the spec language, the CLI, the README table and the contract tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import AttnEdit, Keep, Tags
from vlmattn.errors import BudgetError, LayerError, SpecError
from vlmattn.methods.checks import Checks
from vlmattn.methods.views import Attention, LayerView, Look, View

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
    caution: ClassVar[str] = ""
    """What users should be told once, in words that follow the method's text; empty: nothing."""
    through: ClassVar[str] = ""
    """The call of the session that it acts through, where a plain `generate` cannot; empty: it acts everywhere."""

    @property
    def needs(self) -> frozenset[str]:
        """What the engine must provide for this method: `layer_input`, `layer_keys`, `text_rows`, `projector`, `norms`
        or `content_key` for a `View`, `sink_dims` for a `LayerView`, `text_stream` for a `HeadGain`, a `head_list`."""
        return frozenset()

    @property
    def is_noop(self) -> bool:
        """True if these parameters leave the model exactly as it is, so that nothing need be installed."""
        return False

    def disabled(self) -> Method | None:
        """The same method with its strength at the value that changes nothing; None if it has no strength, so that only
        leaving it out (None is a spec of nothing) disables it."""
        raise NotImplementedError(f"{type(self).__name__} must implement disabled()")

    def parts(self, num_layers: int) -> tuple[Method, ...]:
        """What is installed for it in a model of `num_layers` layers: itself, unless it is made of others."""
        return (self,)

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


SCOPES = ("image", "sample")
POSITIONS = ("original", "compact")
NEWLINES = ("all", "rows", "none")
"""Newline tokens that stay: all of them, those of rows that keep a visual token, or none."""


class Selector(Checks, Method):
    """Decides which visual tokens stay before one decoder layer or several.

    A subclass is a frozen dataclass with a field `before_layer` and implements `select` and `left`. Most methods keep a
    share or a number of the tokens: they start from `Pruner`.

    Attributes:
        paper_layers: the paper's layers in a model of `paper_depth` layers, one for each stage.
        paper_after: whether the paper prunes after these layers, so that the stages are one layer later.
        any_stages: whether `before_layer` may name other numbers of stages than the paper has.
        min_layer: the first layer that can be pruned.
        entry_only: whether it acts on what enters the text model, so that its first stage is at layer 0.
        positions, shrink_early_layers: see `Pruner`.
    """

    kind: ClassVar[str] = "prune"
    paper_layers: ClassVar[tuple[int, ...]] = (0,)
    paper_depth: ClassVar[int] = 32
    paper_after: ClassVar[bool] = False
    any_stages: ClassVar[bool] = False
    min_layer: ClassVar[int] = 0
    entry_only: ClassVar[bool] = False

    before_layer: int | tuple[int, ...] | None
    positions: str = "original"
    shrink_early_layers: bool = False

    def __post_init__(self) -> None:
        """Validate `before_layer`.

        Raises:
            LayerError: it is no layer, or too early for this method.
        """
        given = self.before_layer
        if given is None:
            return
        if isinstance(given, list):
            object.__setattr__(self, "before_layer", tuple(given))
        count, said = len(self.paper_layers), f"{self.name}.before_layer={given!r}"
        wanted = "an int" if count == 1 else f"{count} ints such as {self.paper_layers}"
        layers = (given,) if isinstance(given, int) else given
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise LayerError(f"{said} is not a layer: give {wanted}, or None for the paper's")
        if not layers or (len(layers) != count and not self.any_stages):
            raise LayerError(f"{said}: give {wanted}, one for each stage, or None for the paper's")
        if any(b <= a for a, b in itertools.pairwise(layers)):
            raise LayerError(f"{said}: the layers of the stages must ascend")
        if self.entry_only and layers[0] != 0:
            raise LayerError(f"{said} is too late: it acts on what comes out of the projector, before layer 0")
        if layers[0] < self.min_layer:
            why = "" if self.min_layer == 0 else " (it ranks by what happens inside the decoder)"
            raise LayerError(f"{said} is too early: the first possible is {self.min_layer}{why}")

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """The decoder layers to prune before, ascending, in a model of `num_layers` layers.

        Raises:
            LayerError: the model has no such layer, or too few for all stages.
        """
        given = self.before_layer
        if given is None:
            return self._paper_stages(num_layers)
        layers = (given,) if isinstance(given, int) else given
        if layers[-1] >= num_layers:
            raise LayerError(
                f"{self}: this model has {num_layers} decoder layers, before_layer must be between {self.min_layer} "
                f"and {num_layers - 1}"
            )
        return layers

    def _paper_stages(self, num_layers: int) -> tuple[int, ...]:
        """The paper's layers at this depth: each at least one behind the one before it, the last within the model."""
        layers: list[int] = []
        for layer in self.paper_layers:
            scaled = math.floor(layer * num_layers / self.paper_depth + 0.5) + int(self.paper_after)
            layers.append(max(scaled, self.min_layer, layers[-1] + 1 if layers else 0))
        count = len(layers)
        layers = [min(layer, num_layers - count + place) for place, layer in enumerate(layers)]
        if layers[0] < self.min_layer:
            raise LayerError(
                f"{self}: {count} stages from layer {self.min_layer} on do not fit a model of {num_layers} layers"
            )
        return tuple(layers)

    def resolve_layer(self, num_layers: int) -> int:
        """The decoder layer of the first stage, in a model of `num_layers` layers.

        Raises:
            LayerError: the model has no such layer.
        """
        return self.stages(num_layers)[0]

    def resolved(self, num_layers: int) -> Selector:
        """The same method with its layers written out for a model of `num_layers` layers."""
        layers = self.stages(num_layers)
        written: Any = {"before_layer": layers if len(layers) > 1 else layers[0]}
        return dataclasses.replace(self, **written)

    @property
    def adaptive(self) -> bool:
        """Whether the number of tokens that stay depends on the image; `expected_tokens` then tells the average."""
        return False

    @property
    def merges(self) -> bool:
        """Whether tokens that stay take up values of others, see `Keep.rows`."""
        return False

    @property
    def requires(self) -> frozenset[str]:
        """What a model must have, by the names that families use for their capabilities."""
        return frozenset({"flat_positions"}) if self.positions == "compact" else frozenset()

    @property
    def newlines(self) -> str:
        """Which of the newline tokens stay that end the lines of some images, of `NEWLINES`."""
        return "all"

    @property
    def attention(self) -> Attention | None:
        """The decoder's attention that is wanted as `View.scores`."""
        return None

    @property
    def looks(self) -> Mapping[str, Look]:
        """What is wanted of the vision tower as `View.vision`, by a name of the method's own."""
        return {}

    def query_rows(self, view: LayerView) -> Tensor:
        """`(B, N)` bool, the rows behind `Attention(rows="own")`, chosen from the input of the text model.

        At least one real row of every sample with visual tokens; visual tokens that are dropped later count no more.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement query_rows(view)")

    def select(self, view: View) -> Keep:
        """The tokens that stay."""
        raise NotImplementedError(f"{type(self).__name__} must implement select(view)")

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """How many of the `visual` tokens of an image are left after a stage; `grid` as in `expected_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must implement left(visual, grid, stage)")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """All visual tokens up to the first stage, from there on those that the stages leave."""
        stages = self.stages(num_layers)
        counts = [visual] * num_layers
        if visual and not self.is_noop:
            for stage, layer in enumerate(stages):
                counts[layer:] = [self.left(visual, grid, stage)] * (num_layers - layer)
        return counts


@dataclass(frozen=True)
class Pruner(Selector):
    """Keeps a part of the visual tokens before one decoder layer or several.

    A subclass implements `score` (higher stays; equal scores: the lower index stays) or `select`, and `quota` if it
    has a rounding or stages of its own. The base resolves budgets, order, several images and unequal rows. A `select`
    that keeps other numbers than `quota` says comes with a `left` that tells them.

    Attributes:
        instead_of_keep: the parameter that stands in place of `keep` where it is not None; "" if there is none.

    Raises:
        BudgetError, LayerError, SpecError: a parameter is out of range.
    """

    instead_of_keep: ClassVar[str] = ""

    keep: float | int = param(0.5, "share (float in (0, 1]) or number (int) of the arriving visual tokens that stays")
    before_layer: int | tuple[int, ...] | None = param(
        None, "0-indexed decoder layer whose input is pruned (0: before the LLM); None: the paper's layer at this depth"
    )
    budget_scope: str = param(
        "image", "'image': the budget holds for every image; 'sample': for all images of a prompt"
    )
    positions: str = param("original", "'original': kept tokens keep their positions; 'compact': they are renumbered")
    shrink_early_layers: bool = param(
        False, "after the prefill dropped tokens leave the caches of the layers below as well"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        budget.check(self.keep, f"{self.name}.keep")
        default = next(field.default for field in dataclasses.fields(self) if field.name == "keep")
        if self.fixed and self.keep != default:
            other = f"{self.name}.{self.instead_of_keep}={getattr(self, self.instead_of_keep)!r}"
            raise BudgetError(f"{self.name}.keep={self.keep!r} does nothing beside {other}: leave one of them out")
        for field, words in (("budget_scope", SCOPES), ("positions", POSITIONS)):
            self._one_of(field, words)
        self._flag("shrink_early_layers")
        super().__post_init__()

    @property
    def fixed(self) -> bool:
        """Whether another parameter tells how many tokens stay, so that `keep` must be left at its default."""
        return bool(self.instead_of_keep) and getattr(self, self.instead_of_keep) is not None

    @property
    def is_noop(self) -> bool:
        """True for `keep=1.0`."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def disabled(self) -> Pruner:
        """The same pruner with `keep=1.0`."""
        return dataclasses.replace(self, keep=1.0)

    def quota(self, arriving: int, length: int, stage: int) -> int:
        """How many of the `arriving` tokens of an image with `length` tokens in the prompt stay, both at least 1."""
        return budget.count(arriving, self.keep)

    def score(self, view: View) -> Tensor:
        """`(B, V)` float, higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must implement score(view) or select(view)")

    def select(self, view: View) -> Keep:
        """The tokens that stay; the default ranks `score` within every image."""
        group, counts = self.groups(view)
        return Keep.top(self.score(view), group, counts)

    def left(self, visual: int, grid: tuple[int, int, int] | None = None, stage: int = 0) -> int:
        """What the quotas of the stages leave of one image."""
        left = visual
        for earlier in range(stage + 1):
            left = self.quota(left, visual, earlier)
        return left

    def groups(self, view: View) -> tuple[Tensor, Tensor]:
        """`(B, V)` the budget group of every token and `(B, G)` how many of each group stay."""
        group, arriving, lengths = view.image, view.counts.tolist(), view.lengths
        if self.budget_scope == "sample":
            group = group.clamp_max(0)
            arriving, lengths = [[sum(row)] for row in arriving], [[sum(row)] for row in lengths]
        kept = [
            [self.quota(n, total, view.stage) if n else 0 for n, total in zip(row, totals, strict=True)]
            for row, totals in zip(arriving, lengths, strict=True)
        ]
        return group, torch.tensor(kept, dtype=torch.long, device=view.image.device)


@dataclass(frozen=True)
class Resizer(Method):
    """Changes how large an image is before the processor sees it, on models that take images at their own size."""

    kind: ClassVar[str] = "prune"

    @property
    def requires(self) -> frozenset[str]:
        """A processor that keeps the size of images."""
        return frozenset({"own_resolution"})

    @property
    def adaptive(self) -> bool:
        """Never: the number of tokens follows from that of the image."""
        return False

    def resolve_layer(self, num_layers: int) -> int:
        """Layer 0: all of them see the smaller image."""
        return 0

    def resolved(self, num_layers: int) -> Resizer:
        """The same method: it names no layer."""
        return self

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens that an image of `height` x `width` tokens is brought to."""
        raise NotImplementedError(f"{type(self).__name__} must implement cells(height, width)")


@dataclass(frozen=True)
class Editor(Method):
    """Edits attention in some decoder layers."""

    kind: ClassVar[str] = "attend"

    def layers(self, num_layers: int) -> Sequence[int]:
        """The decoder layers that are edited."""
        raise NotImplementedError(f"{type(self).__name__} must implement layers(num_layers)")

    @property
    def looks(self) -> Mapping[str, Look]:
        """What is wanted of the vision tower as `LayerView.vision`, by a name of the method's own."""
        return {}

    def tags(self, view: LayerView) -> Tags:
        """Groups of the prompt's keys in one layer, by default text and visual; tokens after the prompt are text."""
        return Tags(view.tag, view.visual.any(1))

    def edit(self, layer: int) -> AttnEdit:
        """The edit of one layer."""
        raise NotImplementedError(f"{type(self).__name__} must implement edit(layer)")


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
