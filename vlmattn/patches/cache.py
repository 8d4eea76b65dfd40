"""Ragged caches: where the plan lives, and a first layer that is shorter than `generate()` must believe.

A `DynamicCache` takes layers of different length as it is. Only where the first layer is short as well something is
told: `generate()` reads that layer's length for positions and for slicing a second turn, and the text model sizes its
mask by it, so it reports the logical length. Every short layer takes its columns of that mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmattn.errors import CallError
from vlmattn.plan import Plan, Stage, compact


class PlannedCache(DynamicCache):
    """A `DynamicCache` with a plan: whatever selects or repeats its rows does the same to the plan's.

    Rows are named as the caller counts them: behind them stand, as often as the plan has branches, their likes.

    Attributes:
        plan: what happened to the prompt's visual tokens; None after a reset.
    """

    plan: Plan | None

    def reset(self) -> None:
        """Empty the cache; the plan belongs to the old prompt and goes with it."""
        super().reset()
        if is_empty(self):
            self.plan = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens of every layer, `crop(-n)`.

        Raises:
            CallError: a positive length, which older transformers take as the length to keep; layers differ in length.
                Or more tokens than came since methods last decided what stays.
        """
        length = next(iter((*args, *kwargs.values())), 0)
        if length > 0:
            raise CallError(f"crop({length}) does not fit layers of unequal length: say crop(-n) to remove n tokens")
        if self.plan is not None and -length > (since := int(self.get_seq_length()) - self.plan.said):
            raise CallError(f"crop({length}) reaches into tokens that methods chose from: at most {since} can go")
        super().crop(*args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows `beam_idx` of the cache and of the plan."""
        rows = self._widened(beam_idx)
        super().reorder_cache(rows)
        self._select(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows `indices` of the cache and of the plan."""
        self.take(self._widened(indices))

    def take(self, rows: torch.Tensor) -> None:
        """Rows of the cache and of the plan, those of second branches counted as well."""
        super().batch_select_indices(rows)
        self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, in the cache and in the plan."""
        super().batch_repeat_interleave(repeats)
        if self.plan is not None:
            rows = torch.arange(self.plan.visual.shape[0], device=self.plan.visual.device)
            self._select(rows.repeat_interleave(repeats))

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.plan is None else self.plan.of_branches(rows)

    def _select(self, rows: torch.Tensor) -> None:
        self.plan = None if self.plan is None else self.plan.rows(rows)


class LogicalDynamicLayer(DynamicLayer):
    """A cache layer that reports the conversation's logical length.

    Attributes:
        dropped: columns that it does not hold.
    """

    dropped: int

    def get_seq_length(self) -> int:
        """What it holds and what was dropped; 0 while empty."""
        physical = super().get_seq_length()
        return physical + self.dropped if physical else 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crop by the physical length; negative counts mean the same in both."""
        before, self.dropped = self.dropped, 0
        try:
            super().crop(*args, **kwargs)
        finally:
            self.dropped = before

    def reset(self) -> None:
        """Empty the layer; what was dropped belongs to the old prompt."""
        super().reset()
        self.dropped = 0


def plan_of(cache: Any) -> Plan | None:
    """The plan of a cache, or None."""
    return cache.plan if isinstance(cache, PlannedCache) else None


def is_empty(cache: Any) -> bool:
    """True if nothing was written to the cache yet."""
    return int(cache.get_seq_length()) == 0


def check_plain(cache: Any) -> None:
    """Refuse caches whose layers cannot have a length of their own.

    Raises:
        CallError: a static, quantised, offloaded or sliding-window cache.
    """
    kinds = {type(layer) for layer in cache.layers}
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not None:
        kinds = {cache.layer_class_to_replicate}
    odd = sorted(kind.__name__ for kind in kinds if kind not in (DynamicLayer, LogicalDynamicLayer))
    if type(cache) not in (DynamicCache, PlannedCache):
        odd.append(type(cache).__name__)
    if getattr(cache, "offloading", False):
        odd.append("offloaded layers")
    if odd:
        raise CallError(
            f"the methods need a plain DynamicCache, this one is made of {', '.join(odd)}: leave cache_implementation "
            "unset, or use a model without sliding-window layers"
        )


def check_layers(cache: Any, skipped: Collection[int]) -> None:
    """Refuse a conversation in which other layers were left out than now.

    Raises:
        CallError: a layer that runs has an empty cache, or one that is left out has not.
    """
    layers = getattr(cache, "layers", ())
    if not layers or not isinstance(layers[0], DynamicLayer) or is_empty(cache):
        return
    empty = {index for index, layer in enumerate(layers) if not layer.is_initialized}
    if empty != {index for index in skipped if index < len(layers)}:
        raise CallError(
            f"the cache holds a conversation without layers {sorted(empty)}, now {sorted(skipped)} are left out: "
            "start a fresh cache and pass the whole conversation"
        )


def forget(cache: Any) -> None:
    """Drop the plan of an earlier prompt from an empty cache."""
    if isinstance(cache, PlannedCache):
        cache.plan = None
        set_dropped(cache, 0)


def adopt(cache: Any, plan: Plan) -> None:
    """Put the plan on a plain cache object, which becomes a `PlannedCache` by that."""
    cache.__class__ = PlannedCache
    cache.plan = plan


def set_dropped(cache: Any, dropped: int) -> None:
    """Make the first layer of `cache` report `dropped` more tokens than it holds."""
    if not cache.layers:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[0]
    if not isinstance(layer, LogicalDynamicLayer):
        if dropped == 0:
            return
        logical = LogicalDynamicLayer.__new__(LogicalDynamicLayer)
        logical.__dict__.update(layer.__dict__)
        cache.layers[0] = layer = logical
    layer.dropped = dropped


def shrink(cache: Any, plan: Plan) -> None:
    """End of a prefill: layers below a stage that shrinks them keep only the tokens of that stage."""
    last = next((stage for stage in reversed(plan.stages) if stage.shrinks), None)
    if last is None:
        return
    kept = torch.zeros_like(plan.real).scatter(1, last.positions, last.present)
    keep: dict[int, torch.Tensor] = {}
    for index in range(last.layer):
        before = plan.stage(index)
        same = index > 0 and before is plan.stage(index - 1)
        keep[index] = keep[index - 1] if same else kept if before is None else kept.gather(1, before.positions)
    cut(cache, plan, keep, dict.fromkeys(keep, last.method))


def cut(
    cache: Any, plan: Plan, keep: Mapping[int, torch.Tensor], methods: Mapping[int, str]
) -> dict[int, tuple[Stage, torch.Tensor]]:
    """Remove keys and values from layers for good, and note in the plan what they hold.

    Args:
        cache: of the plan; it may hold further slots behind those of the plan, which stay.
        plan: changed in place.
        keep: per layer `(B, S)` bool over the slots it holds according to the plan. Empty slots go in any case; a layer
            in which every token stays is left as it is.
        methods: per layer the text of the method that decided.

    Returns:
        Per layer that was cut what it holds now, and the slots `(B, M)` that these were.
    """
    done: dict[int, tuple[Stage, torch.Tensor]] = {}
    made: dict[tuple[int, int], tuple[Stage, torch.Tensor] | None] = {}
    held: list[Stage] = []
    source: Stage | None = None
    for index, layer in enumerate(cache.layers):
        before = plan.holding(index)
        stage, flags = before, keep.get(index)
        if flags is not None:
            key = id(before), id(flags)
            if key not in made:
                made[key] = _cut_stage(plan, before or plan.whole(index), flags, index, methods[index])
            if (found := made[key]) is not None:
                stage, slots = found
                _cut_layer(layer, slots, before.size if before else plan.length)
                if index in plan.tags:
                    plan.tags[index] = plan.tags[index].at(slots, stage.valid)
                done[index] = found
        if not held or stage is not source:
            shift = None if before is None or (before.layer == 0 and index) else before.shift
            held.append(dataclasses.replace(stage or plan.whole(index), layer=index, rotary=None, shift=shift))
        source = stage
    if done:
        plan.held = held
        set_dropped(cache, plan.dropped_at_entry)
    return done


def _cut_stage(
    plan: Plan, before: Stage, flags: torch.Tensor, layer: int, method: str
) -> tuple[Stage, torch.Tensor] | None:
    """What is left of a stage, and the slots of it `(B, M)`; None if nothing goes."""
    real = before.present & plan.real.gather(1, before.positions)
    flags = flags.to(real.device)
    if bool((flags | ~real).all()):
        return None
    slots, valid = compact(flags & real)
    columns = before.positions.gather(1, slots)
    return Stage(layer, method, columns, columns, valid), slots


def _cut_layer(layer: Any, slots: torch.Tensor, size: int) -> None:
    """Keep `slots` `(B, M)` of the first `size` keys and values of a layer, and all behind them; an empty one stays."""
    if not layer.is_initialized:
        return
    behind = torch.arange(size, layer.keys.shape[2], device=slots.device).expand(len(slots), -1)
    places = torch.cat([slots, behind], 1)[:, None, :, None].to(layer.keys.device)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        setattr(layer, name, held.gather(2, places.expand(-1, held.shape[1], -1, held.shape[3])))


def join(cache: Any, other: Any) -> None:
    """Append the rows of `other` to those of `cache`, each layer padded on the left to the longer of both."""
    for mine, theirs in zip(cache.layers, other.layers, strict=False):
        if not mine.is_initialized:  # a layer that is left out holds nothing
            continue
        for name in ("keys", "values"):
            both = [getattr(mine, name), getattr(theirs, name)]
            width = max(x.shape[2] for x in both)
            padded = [torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in both]
            setattr(mine, name, torch.cat(padded))
