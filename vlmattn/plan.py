"""The per-generation state: which tokens of the prompt each decoder layer still holds, and masks for such ragged
layers.

A plan lives on the cache object, so two generations, a second turn or a text-only branch never see each other's plan.
Frames: the *prompt frame* counts the columns of the padded prompt; the *base frame* those that the text model's own
mask and rotary tables cover in the prefill, which is shorter when pruning happened at the entry of the text model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmattn.edits import Tags
from vlmattn.spans import Span

T = TypeVar("T", Tensor, Tensor | None)


@dataclass(frozen=True)
class Stage:
    """The tokens that layers from `layer` on (up to the next stage) hold of the prompt.

    Attributes:
        layer: first decoder layer with these tokens.
        method: text of the method that chose them.
        positions: `(B, M)` long, their prompt-frame columns, ascending, right-aligned.
        base: `(B, M)` long, their base-frame columns.
        valid: `(B, M)` bool, False at filler slots of rows that keep fewer tokens; None if every slot is a token.
        rotary: `(B, M)` long, the base-frame columns whose rotary positions they take; None: their own.
        shift: `(B,)` long, how much lower positions are here than in the base frame (at the entry: than in the prompt)
            for all tokens after the prompt; None: not at all.
        shrinks: whether the caches of the layers below are cut to these tokens after the prefill.
    """

    layer: int
    method: str
    positions: Tensor
    base: Tensor
    valid: Tensor | None
    rotary: Tensor | None = None
    shift: Tensor | None = None
    shrinks: bool = False

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.positions.shape[1]

    @property
    def present(self) -> Tensor:
        """`(B, M)` bool, False at filler slots."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.valid is None else self.valid

    def without_last(self, n: int) -> Stage:
        """The stage without its last `n` slots."""
        return self._each(lambda x: x[:, :-n], lambda x: x)

    def longer(self, start: int, n: int) -> Stage:
        """What a layer holds if the `n` columns from `start` on come as further slots."""
        more = torch.arange(start, start + n, device=self.positions.device).expand(len(self.positions), -1)
        return dataclasses.replace(
            self,
            positions=torch.cat([self.positions, more], 1),
            base=torch.cat([self.base, more], 1),
            valid=None if self.valid is None else torch.nn.functional.pad(self.valid, (0, n), value=True),
            rotary=None,
        )

    def rows(self, index: Tensor) -> Stage:
        """The stage of some rows of the batch."""
        return self._each(lambda x: x[index], lambda x: x[index])

    def to(self, device: torch.device) -> Stage:
        """The same stage on another device (models split over several)."""
        if self.positions.device == device:
            return self
        return self._each(lambda x: x.to(device), lambda x: x.to(device))

    def _each(self, slots: Callable[[Tensor], Tensor], row: Callable[[Tensor], Tensor]) -> Stage:
        """The stage with `slots` applied to what has a value per slot and `row` to what has one per row."""
        return dataclasses.replace(
            self,
            positions=slots(self.positions),
            base=slots(self.base),
            valid=None if self.valid is None else slots(self.valid),
            rotary=None if self.rotary is None else slots(self.rotary),
            shift=None if self.shift is None else row(self.shift),
        )


@dataclass
class Plan:
    """What happened to the visual tokens of one prefill.

    Attributes:
        real: `(B, N)` bool, False at padding.
        visual: `(B, N)` bool; newline tokens, which stand among visual ones, are none.
        image: `(B, N)` long, image of each token within its sample, -1 for text.
        newline: `(B, N)` long, at a newline token the visual tokens of the line that it ends, elsewhere 0. For pruning
            newline tokens are text that nobody asks by; for edits of attention they are visual.
        spans: per sample the spans of its images.
        ahead: guessed tokens behind the prompt that went through the prefill with it; `settle` forgets them.
        stages: in order of layer, as the prefill ran.
        held: in order of layer, what the cache holds after the prefill if that is less; None: the same.
        text: `(B, N)` bool, what a prompt without its images consists of: real tokens that are neither visual nor
            wrap an image.
        keys: per sample and image the content keys, if a method needs them.
        prompt: columns of the padded prompt; `length` is more where tokens after it were taken up, see `extended`.
        core: per layer the slots, among those it holds, that are computed in passes in which others are hidden.
        state: per layer what the method that evicts from it carries along, tensors `(B, ..., slots)`.
        tags: per edited layer the groups of the keys it holds of the prompt.
        gains: per reinforced layer the factors of its heads, `(B, H)`; divergences: the statistic they were chosen by.
        token_divergences: per layer the same statistic of the prompt's last row and all after it, `(B, n, H)`, if
            asked for.
        evidence: `(B, V)` fp32, logarithms of the factors of the visual tokens of the prompt in order, newline tokens
            included, of a method that answered twice.
        grounding: `(B, M + n)` fp32, how much the text slots of layer 0 and the tokens after the prompt look at this
            evidence; NaN where nobody asked.
        rehearsing: whether this answer is only looked at.
        observed: per pass and layer what the last row of such an answer saw of the visual tokens, `(B, V)` fp32.
        segment: `(B, N)` long, the segment of each token where some stand side by side, -1 for none; stacked: positions
            `(A, B, N)` long of the prompt; extent: `(B, J)` long, positions of each segment; tables: cosines and sines
            `(B, M + n, D)` of the positions of all keys.
        samples: rows of the caller; the plan has twice as many while a text-only stream runs beside.
        skipped: decoder layers that were left out.
        closed: whether everything about the caches is decided, so that nobody watches any more.
        branches: how often the rows of the caller stand here, 2 with a second branch behind them.
        extra: columns on the left by which the prompt of a second branch is longer than the caller's.
        shift: `(rows,)` long, how much higher the positions after the prompt are than the caller says; None: not at
            all.
        sources: per sample where its images went through the vision tower, if anybody looked.
        steps: per pass, per layer the statistics `(rows, H, 4)` of the last row, if recorded.
        scores: attention received, for the stage before a layer, `(B, slots)` or `(B, H, slots)` fp32.
        layer_keys: keys `(B, Hkv, slots, D)` for the stage before a layer.
        ranking: per method text the scores of its first stage, `(B, N)` or `(B, H, N)` fp32, if they serve all stages.
        attended: per layer what the last prompt token pays to the columns of the prompt, `(B, N)` fp32, mean over
            heads, if a second branch needs it.
        memory: `(B, V, C)` the visual rows of the text model's input, zeros at padding, if a method retraces them.
        query_rows: `(B, N)` bool, the query rows that the method with that text chose at the entry.
        paired: the questions beside the vision tower, if a method compares them with patches.
        vision: what methods look at in the vision tower, `(B, V, ...)` over the visual tokens of the prompt in order.
        added: per layer the features `(B, N, C)` that the model adds to what enters it, zeros at text.
    """

    real: Tensor
    visual: Tensor
    image: Tensor
    newline: Tensor
    spans: Sequence[Sequence[Span]]
    ahead: int = 0
    stages: list[Stage] = field(default_factory=list)
    held: list[Stage] | None = None
    text: Tensor | None = None
    keys: tuple[tuple[int, ...], ...] | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    layer_keys: dict[int, Tensor] = field(default_factory=dict)
    ranking: dict[str, Tensor] = field(default_factory=dict)
    attended: dict[int, Tensor] = field(default_factory=dict)
    query_rows: dict[str, Tensor] = field(default_factory=dict)
    paired: Any = None
    vision: dict[Any, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    tags: dict[int, Tags] = field(default_factory=dict)
    gains: dict[int, Tensor] = field(default_factory=dict)
    divergences: dict[int, Tensor] = field(default_factory=dict)
    token_divergences: dict[int, Tensor] = field(default_factory=dict)
    evidence: Tensor | None = None
    grounding: Tensor | None = None
    rehearsing: bool = False
    observed: list[dict[int, Tensor]] = field(default_factory=list)
    segment: Tensor | None = None
    stacked: Tensor | None = None
    extent: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None
    memory: Tensor | None = None
    samples: int = 0
    skipped: frozenset[int] = frozenset()
    closed: bool = False
    branches: int = 1
    extra: int = 0
    shift: Tensor | None = None
    sources: Sequence[Sequence[tuple[int, int]]] | None = None
    steps: list[dict[int, Tensor]] = field(default_factory=list)
    prompt: int = 0
    core: dict[int, Stage] = field(default_factory=dict)
    state: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Columns of the padded prompt, and of what was taken up since."""
        return self.visual.shape[1]

    @property
    def entry(self) -> Stage | None:
        """What the first layer holds of the prompt, or None if that is all."""
        return self.holding(0)

    @property
    def base_length(self) -> int:
        """Columns of the base frame."""
        return self.length if self.entry is None else self.entry.size

    @property
    def dropped_at_entry(self) -> int:
        """Columns of the caller's prompt that the first layer does not hold; negative if it holds more."""
        return self.said - self.base_length

    @property
    def said(self) -> int:
        """Columns of the prompt as the caller counts them."""
        return self.length - self.extra

    def copy(self) -> Plan:
        """The same plan with tables of its own."""
        tables = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {name: copy.copy(value) for name, value in tables.items() if type(value) in (dict, list)}
        return dataclasses.replace(self, **own)

    def of_branches(self, rows: Tensor) -> Tensor:
        """Rows of the plan for rows `(n,)` of the caller: the same of every branch."""
        return torch.cat([rows + branch * self.samples for branch in range(self.branches)])

    def settle(self) -> None:
        """End of the prefill: from now on guessed tokens count as any token after the prompt.

        They are text, so every stage holds them in its last slots. What only selections need is let go.
        """
        for table in (self.scores, self.ranking, self.layer_keys, self.query_rows, self.vision, self.added):
            table.clear()
        self.paired = None
        if self.ahead:
            end, self.ahead = -self.ahead, 0
            for name in ("real", "visual", "image", "newline"):
                setattr(self, name, getattr(self, name)[:, :end])
            self.segment = None if self.segment is None else self.segment[:, :end]
            self.stages = [stage.without_last(-end) for stage in self.stages]
            self.held = None if self.held is None else [stage.without_last(-end) for stage in self.held]
            self.tags = {layer: tags.without_last(-end) for layer, tags in self.tags.items()}
        self.prompt = self.length

    def extended(self, n: int) -> Plan:
        """The plan that takes up the `n` columns after it, as text: from now on it says which of them layers hold."""

        def pad(x: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, n), value=value)

        stages = self.stages if self.held is None else self.held
        return dataclasses.replace(
            self,
            real=pad(self.real, True),
            visual=pad(self.visual, False),
            image=pad(self.image, -1),
            newline=pad(self.newline, 0),
            text=None if self.text is None else pad(self.text, True),
            held=[stage.longer(self.length, n) for stage in stages],
            tags={layer: tags.longer(n) for layer, tags in self.tags.items()},
            core={},
            state={layer: {name: pad(x, 0) for name, x in state.items()} for layer, state in self.state.items()},
        )

    def prompt_only(self) -> Plan:
        """The plan as it was after the prefill, without what was taken up since, and with nothing left to decide."""
        end = self.prompt
        return dataclasses.replace(
            self,
            real=self.real[:, :end],
            visual=self.visual[:, :end],
            image=self.image[:, :end],
            newline=self.newline[:, :end],
            text=None if self.text is None else self.text[:, :end],
            held=None,
            tags={layer: Tags(tags.tag[:, :end], tags.active, tags.acts) for layer, tags in self.tags.items()},
            core={},
            state={},
            steps=[],
            closed=True,
        )

    def rows(self, index: Tensor) -> Plan:
        """The plan of rows `index` `(n,)` long, in that order; self if the order is the old one."""
        index = index.to(self.visual.device)
        order = index.tolist()
        if order == list(range(self.visual.shape[0])):
            return self
        return dataclasses.replace(
            self,
            samples=len(order) // self.branches,
            memory=None if self.memory is None else self.memory[_on(index, self.memory)],
            shift=None if self.shift is None else self.shift[_on(index, self.shift)],
            real=self.real[index],
            visual=self.visual[index],
            image=self.image[index],
            newline=self.newline[index],
            spans=[self.spans[row] for row in order],
            text=None if self.text is None else self.text[index],
            stages=[stage.rows(index) for stage in self.stages],
            held=None if self.held is None else [stage.rows(index) for stage in self.held],
            tags={layer: tags.rows(index) for layer, tags in self.tags.items()},
            gains={layer: gain[_on(index, gain)] for layer, gain in self.gains.items()},
            divergences={layer: vhd[_on(index, vhd)] for layer, vhd in self.divergences.items()},
            core={layer: stage.rows(index) for layer, stage in self.core.items()},
            state={layer: {k: x[_on(index, x)] for k, x in state.items()} for layer, state in self.state.items()},
            keys=None if self.keys is None else tuple(self.keys[row] for row in order),
            evidence=_rows(self.evidence, index),
            grounding=_rows(self.grounding, index),
            segment=_rows(self.segment, index),
            stacked=None,
            extent=_rows(self.extent, index),
            tables=None if self.tables is None else (_rows(self.tables[0], index), _rows(self.tables[1], index)),
        )

    def stage(self, layer: int) -> Stage | None:
        """The stage that ruled decoder layer `layer` in the prefill, or None if the layer saw the whole prompt."""
        return _ruling(self.stages, layer)

    def holding(self, layer: int) -> Stage | None:
        """The stage of what the cache of decoder layer `layer` holds, or None if it holds the whole prompt."""
        return _ruling(self.stages if self.held is None else self.held, layer)

    def whole(self, layer: int) -> Stage:
        """A stage from `layer` on that holds every column."""
        columns = torch.arange(self.length, device=self.visual.device).expand_as(self.visual)
        return Stage(layer, "", columns, columns, None)


def _ruling(stages: Sequence[Stage], layer: int) -> Stage | None:
    ruling = [stage for stage in stages if stage.layer <= layer]
    return ruling[-1] if ruling else None


def _rows(x: T, index: Tensor) -> T:
    return x if x is None else x[_on(index, x)]


def _on(index: Tensor, like: Tensor) -> Tensor:
    return index.to(like.device)


def compact(keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Column indices of the kept tokens of every row, right-aligned.

    Args:
        keep: `(B, N)` bool.

    Returns:
        `(B, M)` long indices, ascending within the valid slots, and `(B, M)` bool validity, None if all slots are
        valid; M is the largest number of kept tokens of a row.
    """
    counts = keep.sum(1)
    size = int(counts.max())
    order = torch.argsort(keep.long(), dim=1, stable=True)
    index = order[:, keep.shape[1] - size :]
    valid = keep.gather(1, index)
    return index, None if bool((counts == size).all()) else valid


def gather_rows(x: Tensor, index: Tensor, dim: int = -2) -> Tensor:
    """Rows `index` `(B, M)` of `x` `(..., B or 1, N, C)` along `dim` -2, or of `(..., B or 1, N)` along -1."""
    batch, size = index.shape
    if dim == -1:
        x = x.expand(*x.shape[:-2], batch, x.shape[-1])
        return x.gather(-1, index.expand(*x.shape[:-2], batch, size))
    x = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
    return x.gather(-2, index[..., None].expand(*x.shape[:-3], batch, size, x.shape[-1]))


def prefill_mask(mask: Tensor | None, stage: Stage) -> Tensor | None:
    """The attention mask of a pruned layer during the prefill.

    Args:
        mask: the text model's mask in the base frame: None (causal), `(B, Nb)` valid keys (flash), or `(B or 1, 1,
            Nb, Nb)` bool or additive.
        stage: the ruling stage.

    Returns:
        The mask over the stage's slots; None stays None unless rows are unequal. Filler slots see only themselves, so
        that nothing of them is undefined; nobody else sees them.
    """
    if mask is None and stage.valid is None:
        return None
    if mask is not None and mask.ndim == 2:
        return _valid_columns(mask, stage, stage.base)
    size, device = stage.size, stage.base.device
    if mask is None:
        square = torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]
    else:
        batch = stage.base.shape[0]
        mask = mask.expand(batch, *mask.shape[1:])
        rows = mask.gather(2, stage.base[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        square = rows.gather(3, stage.base[:, None, None, :].expand(-1, mask.shape[1], size, -1))
    if stage.valid is None:
        return square
    alone = torch.diag_embed(~stage.valid)[:, None]
    return _restrict(square, stage.valid[:, None, None, :], alone)


def decode_mask(mask: Tensor | None, stage: Stage, length: int, new: int, batch: int) -> Tensor | None:
    """The attention mask of a short layer for tokens after the prompt.

    Args:
        mask: the text model's mask in the prompt frame, keys `length + new` (or more); None, 2-D or 4-D as above.
        stage: what the layer holds of the prompt.
        length: columns of the prompt frame.
        new: keys after the prompt, including the current tokens.
        batch: rows of the current call.
    """
    if mask is None:
        if stage.valid is None:
            return None
        head = stage.valid
        return torch.cat([head, head.new_ones(batch, new)], 1)[:, None, None, :]
    if mask.ndim == 2:
        return torch.cat([_valid_columns(mask, stage, stage.positions), mask[:, length:]], 1)
    mask = mask.expand(batch, *mask.shape[1:])
    index = stage.positions[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    head = mask[..., :length].gather(3, index)
    if stage.valid is not None:
        head = _restrict(head, stage.valid[:, None, None, :], None)
    return torch.cat([head, mask[..., length:]], -1)


def limit(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask of tokens after the prompt (None, 2-D or 4-D as above) restricted to keys `seen` `(B, S)` bool."""
    if mask is None:
        return seen[:, None, None, :]
    if mask.ndim == 2:
        return mask * seen.to(mask.dtype)
    return _restrict(mask.expand(len(seen), *mask.shape[1:]), seen[:, None, None, :], None)


def _valid_columns(mask: Tensor, stage: Stage, index: Tensor) -> Tensor:
    columns = mask.gather(1, index)
    return columns if stage.valid is None else columns * stage.valid.to(columns.dtype)


def _restrict(mask: Tensor, allowed: Tensor, always: Tensor | None) -> Tensor:
    """Limit a bool or additive mask to `allowed` keys; `always` entries stay visible whatever the rest says."""
    if mask.dtype == torch.bool:
        limited = mask & allowed
        return limited if always is None else limited | always
    limited = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    return limited if always is None else limited.masked_fill(always, 0.0)
