"""Ragged caches: where the plan lives, and a first layer that is shorter than `generate()` must believe.

A `DynamicCache` takes layers of different length as it is. Only after pruning at the entry of the text model the first
layer is short as well; `generate()` reads that layer's length for positions and for slicing a second turn, so outside
the text model it must report the logical length, and inside the physical one (the mask is sized by it).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmattn.errors import CallError
from vlmattn.plan import Plan, Stage


class PlannedCache(DynamicCache):
    """A `DynamicCache` with a plan: whatever selects or repeats its rows does the same to the plan's.

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
        """
        length = next(iter((*args, *kwargs.values())), 0)
        if length > 0:
            raise CallError(f"crop({length}) does not fit layers of unequal length: say crop(-n) to remove n tokens")
        super().crop(*args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows `beam_idx` of the cache and of the plan."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows `indices` of the cache and of the plan."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, in the cache and in the plan."""
        super().batch_repeat_interleave(repeats)
        if self.plan is not None:
            rows = torch.arange(self.plan.visual.shape[0], device=self.plan.visual.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor) -> None:
        self.plan = None if self.plan is None else self.plan.rows(rows)


class LogicalDynamicLayer(DynamicLayer):
    """A cache layer that reports the prompt's logical length outside the text model.

    Attributes:
        dropped: prompt columns that were never written.
        inside: True while the text model runs.
    """

    dropped: int
    inside: bool

    def get_seq_length(self) -> int:
        """Physical length inside the text model, logical length outside; 0 while empty."""
        physical = super().get_seq_length()
        return physical if self.inside or physical == 0 else physical + self.dropped

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crop by the physical length; negative counts mean the same in both."""
        before, self.inside = self.inside, True
        try:
            super().crop(*args, **kwargs)
        finally:
            self.inside = before

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
    """Make the first layer of `cache` report `dropped` more tokens than it holds when asked from outside."""
    if not cache.layers:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[0]
    if not isinstance(layer, LogicalDynamicLayer):
        if dropped == 0:
            return
        logical = LogicalDynamicLayer.__new__(LogicalDynamicLayer)
        logical.__dict__.update(layer.__dict__)
        logical.inside = False
        cache.layers[0] = layer = logical
    layer.dropped = dropped


def shrink(cache: Any, plan: Plan) -> None:
    """End of a prefill: layers below a stage that shrinks them keep only the tokens of that stage."""
    last = next((stage for stage in reversed(plan.stages) if stage.shrinks), None)
    if last is None:
        return
    for index, layer in enumerate(cache.layers[: last.layer]):
        slots = _slots(plan, plan.stage(index), last)
        places = slots[:, None, :, None].to(layer.keys.device)
        for name in ("keys", "values"):
            held = getattr(layer, name)
            setattr(layer, name, held.gather(2, places.expand(-1, held.shape[1], -1, held.shape[3])))
        if index in plan.tags:
            plan.tags[index] = plan.tags[index].at(slots, last.valid)
    held_stages = []
    for first in sorted({0, *(stage.layer for stage in plan.stages)}):
        own = plan.stage(first)
        stage = last if own is None or first < last.layer else own
        base, shift = _slots(plan, last, stage), None if own is None else own.shift
        held_stages.append(dataclasses.replace(stage, layer=first, base=base, rotary=None, shift=shift))
    plan.held = held_stages
    set_dropped(cache, plan.dropped_at_entry)


def _slots(plan: Plan, before: Stage | None, after: Stage) -> torch.Tensor:
    """`(B, M)` long, the slots of the tokens of one stage among those of an earlier one; any slot for a filler."""
    if before is None:
        return after.positions
    columns = before.positions if before.valid is None else before.positions.where(before.valid, plan.length)
    slots = columns.new_zeros(len(columns), plan.length + 1)
    slots.scatter_(1, columns, torch.arange(before.size, device=columns.device).expand_as(columns))
    return slots.gather(1, after.positions)


def set_inside(cache: Any, inside: bool) -> None:
    """Tell the first layer whether the text model is running."""
    if cache is not None and getattr(cache, "layers", None) and isinstance(cache.layers[0], LogicalDynamicLayer):
        cache.layers[0].inside = inside
