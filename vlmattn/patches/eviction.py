"""Asking methods that evict from the cache: what they watch in a pass, the view of each layer, and the cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.edits import NOT_A_KEY, Eviction
from vlmattn.errors import SpecError
from vlmattn.methods.cache import Evictor
from vlmattn.methods.views import CacheView, Watch
from vlmattn.patches import cache as caches
from vlmattn.patches.selection import frame, query_rows
from vlmattn.plan import Plan, Stage, compact, decode_mask, limit
from vlmattn.spans import chunk_index

GATHER_BELOW = 0.5
"""Computed keys are gathered where they are less than this share of those held, else the others are masked."""


@dataclass
class Watching:
    """What evictors watch in one pass.

    Attributes:
        evictors: by layer.
        step, new: tokens after the prompt, and of this pass, as `Evictor.decides` counts them.
        seen: per layer and name the attention received by the slots that the layer held in this pass.
    """

    evictors: Mapping[int, Evictor]
    step: int
    new: int
    seen: dict[int, dict[str, Tensor]] = dataclasses.field(default_factory=dict)

    def decides(self, layer: int) -> bool:
        """Whether a decision about `layer` follows this pass."""
        evictor = self.evictors.get(layer)
        return evictor is not None and evictor.decides(self.step, self.new)

    def hides(self, layer: int) -> bool:
        """Whether hidden keys of `layer` are left out of this pass."""
        evictor = self.evictors.get(layer)
        return evictor is not None and self.step > 0 and evictor.hides(self.step, self.new)

    def options(self, layer: int, watch: Watch, plan: Plan, stage: Stage | None, device: Any) -> dict[str, Any]:
        """`rows` and `heads` of `attention_received` for one watch on `layer`, which holds `stage` of the prompt."""
        if self.step == 0:
            rows = _chunks(plan, stage) if watch.rows == "chunks" else query_rows(watch.rows, "", plan, stage)
        else:
            held = plan.length if stage is None else stage.size
            since = self.step - (plan.length - plan.prompt)  # further ones are held already
            first = held + since - (1 if watch.rows == "last" else self.new)
            rows = (torch.arange(held + since, device=device) >= first).expand(len(plan.visual), -1)
            rows = rows[:, None][:, :0] if watch.rows == "chunks" else rows
        return {"rows": rows.to(device), "heads": watch.heads}

    def put(self, layer: int, name: str, options: Mapping[str, Any], core: Core | None, scores: Tensor) -> None:
        """Note what was seen, over all slots of the layer."""
        watch, rows = self.evictors[layer].watched[name], options["rows"]
        if watch.total:
            count = rows.sum(-1).to(scores.device)
            scores = scores * count.view(*count.shape, *[1] * (scores.ndim - count.ndim))
        if core is not None and core.taken is not None:
            places = core.taken.view(len(core.taken), *[1] * (scores.ndim - 2), -1).expand_as(scores)
            scores = scores.new_zeros(*scores.shape[:-1], core.seen.shape[1]).scatter(-1, places, scores)
        self.seen.setdefault(layer, {})[name] = scores


def _chunks(plan: Plan, stage: Stage | None) -> Tensor:
    """`(B, G, M)` bool, the rows of each image or frame."""
    columns, _, visual, _ = frame(plan, stage)
    chunk = chunk_index(plan.spans, plan.length, columns.device).gather(1, columns)
    number = torch.arange(int(chunk.max()) + 1, device=columns.device)
    return (chunk[:, None] == number[:, None]) & visual[:, None]


@dataclass(frozen=True)
class Core:
    """The keys of a layer that one pass computes while others are hidden.

    Attributes:
        seen: `(B, S)` bool over all keys of the layer, those of the pass included.
        taken: `(B, M)` long, the same as slots if they are gathered; None: the others are masked.
        mask: the layer's attention mask, over what is taken.
    """

    seen: Tensor
    taken: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, core: Stage, new: int, size: int, mask: Tensor | None, batch: int, device: Any) -> Core:
        """Of a layer that holds `size` slots of the prompt and `new` behind it, `core` of them computed."""
        core = core.to(device)
        seen = torch.zeros(batch, size, dtype=torch.bool, device=device).scatter(1, core.positions, core.present)
        seen = torch.nn.functional.pad(seen, (0, new), value=True)
        if core.size >= GATHER_BELOW * size:
            return cls(seen, None, limit(mask, seen))
        behind = torch.arange(size, size + new, device=device).expand(batch, -1)
        return cls(seen, torch.cat([core.positions, behind], 1), decode_mask(mask, core, size, new, batch))

    def rows(self, rows: Tensor) -> Tensor:
        """Query rows `(B, ..., S)` of the pass, counted in what is taken; both end with them."""
        return rows if self.taken is None else rows[..., -self.taken.shape[1] :]

    def tags(self, tag: Tensor) -> Tensor:
        """Groups of the keys `(B, S)`, of those that are taken or with the others as no keys."""
        return tag.masked_fill(~self.seen, NOT_A_KEY) if self.taken is None else tag.gather(1, self.taken)


def decide(watching: Watching, cache: Any) -> None:
    """After a pass: ask the methods that decide now, and carry it out on the cache and its plan.

    Args:
        watching: what was seen in the pass.
        cache: that the pass wrote to; what it holds behind the plan's columns, guesses of the prefill, stays.

    Raises:
        SpecError: a method returned something that is no decision about these keys.
    """
    deciding = [layer for layer in range(len(cache.layers)) if watching.decides(layer)]
    if not deciding:
        return
    plan: Plan = cache.plan
    if watching.step:
        cache.plan = plan = plan.extended(watching.step - (plan.length - plan.prompt))
    decided: list[tuple[CacheView, Eviction]] = []
    for evictor in dict.fromkeys(watching.evictors[layer] for layer in deciding):
        layers = [layer for layer in deciding if watching.evictors[layer] is evictor]
        views = [_view(watching, layer, plan, len(cache.layers)) for layer in layers]
        decided += zip(views, _checked(evictor, evictor.evict(views), views), strict=True)
    keep = {view.layer: eviction.keep for view, eviction in decided if eviction.keep is not None}
    done = caches.cut(cache, plan, keep, {layer: str(watching.evictors[layer]) for layer in keep})
    for view, eviction in decided:
        _note(plan, view, eviction, done.get(view.layer))


def remembered(evictor: Evictor, cache: Any, num_layers: int) -> list[CacheView]:
    """What a method sees between two passes of the layers that it decides about: what it left there, and no scores."""
    plan: Plan = cache.plan
    watching = Watching({}, plan.length - plan.prompt, 0)
    layers = [layer for layer in evictor.layers(num_layers) if layer not in plan.skipped]
    return [_view(watching, layer, plan, num_layers) for layer in layers]


def _note(plan: Plan, view: CacheView, eviction: Eviction, done: tuple[Stage, Tensor] | None) -> None:
    """Keep in the plan what a decision hides, and its state, for the slots that are left."""
    layer, real, hide, state = view.layer, view.real, eviction.hide, eviction.state
    if done is not None:
        stage, slots = done
        real = stage.present
        hide = None if hide is None else hide.gather(1, slots.to(hide.device))
        state = {name: _at(x, slots, real) for name, x in state.items()}
    plan.state[layer] = state
    plan.core.pop(layer, None)
    if hide is not None and bool((computed := real & ~hide.to(real.device)).ne(real).any()):
        index, valid = compact(computed)
        plan.core[layer] = Stage(layer, "", index, index, valid)


def _at(x: Tensor, slots: Tensor, present: Tensor) -> Tensor:
    """`(B, ..., M)`, the values `x` `(B, ..., S)` of some slots `(B, M)`, 0 where there is none."""
    shape = (len(slots), *[1] * (x.ndim - 2), slots.shape[1])
    slots, present = (y.to(x.device).view(shape).expand(*x.shape[:-1], -1) for y in (slots, present))
    return x.gather(-1, slots) * present


def _view(watching: Watching, layer: int, plan: Plan, num_layers: int) -> CacheView:
    stage = plan.holding(layer)
    columns, real, visual, _ = frame(plan, stage)
    chunk = chunk_index(plan.spans, plan.length, columns.device).gather(1, columns)
    image = plan.image.gather(1, columns)
    size, rows = columns.shape[1], len(columns)
    scores = {name: x[:rows, ..., :size] for name, x in watching.seen.get(layer, {}).items()}
    return CacheView(
        layer=layer,
        num_layers=num_layers,
        step=watching.step,
        new=watching.new if watching.step else size,
        column=columns,
        real=real,
        visual=visual,
        image=image.where(visual, -1),
        chunk=chunk.where(visual, -1),
        spans=tuple(tuple(row) for row in plan.spans),
        scores={name: x.to(columns.device) for name, x in scores.items()},
        state=plan.state.get(layer, {}),
    )


def _checked(evictor: Evictor, found: Sequence[Eviction], views: Sequence[CacheView]) -> Sequence[Eviction]:
    if len(found) != len(views):
        raise SpecError(f"{evictor}: evict() must give a decision for each of {len(views)} layers, got {len(found)}")
    for view, eviction in zip(views, found, strict=True):
        shape = tuple(view.real.shape)
        for name in ("keep", "hide"):
            flags = getattr(eviction, name)
            if flags is not None and (tuple(flags.shape) != shape or flags.dtype != torch.bool):
                raise SpecError(
                    f"{evictor}: {name} of an Eviction must be a bool mask of shape {shape}, got {flags.dtype} "
                    f"{tuple(flags.shape)}"
                )
        for name, x in eviction.state.items():
            if (x.shape[0], x.shape[-1]) != shape:
                raise SpecError(f"{evictor}: state {name!r} must be (B, ..., S) with {shape}, got {tuple(x.shape)}")
    return found
