"""Ragged caches: where the plan lives, and a first layer that is shorter than `generate()` must believe.

A `DynamicCache` takes layers of different length as it is. Only after pruning at the entry of the text model the
first layer is short as well; `generate()` reads that layer's length for positions and for slicing a second turn, so
outside the text model it must report the logical length, and inside the physical one (the mask is sized by it).
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer

from vlmattn.errors import CallError
from vlmattn.plan import Plan

PLAN = "_vlmattn_plan"


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
    return getattr(cache, PLAN, None)


def attach(cache: Any, plan: Plan) -> None:
    """Put the plan on the cache object."""
    setattr(cache, PLAN, plan)


def is_empty(cache: Any) -> bool:
    """True if nothing was written to the cache yet."""
    return int(cache.get_seq_length()) == 0


def check_prunable(cache: Any) -> None:
    """Refuse caches whose layers cannot have their own length.

    Raises:
        CallError: a static, quantised, offloaded or sliding-window cache.
    """
    kinds = {type(layer) for layer in cache.layers} or {DynamicLayer}
    layer_class = getattr(cache, "layer_class_to_replicate", None)
    if not cache.layers and layer_class is not None:
        kinds = {layer_class}
    odd = sorted(kind.__name__ for kind in kinds if kind not in (DynamicLayer, LogicalDynamicLayer))
    if odd or getattr(cache, "offloading", False):
        what = ", ".join(odd) or "offloaded layers"
        raise CallError(
            f"pruning needs a plain DynamicCache, this one has {what}: leave cache_implementation unset, "
            "or use a model without sliding-window layers"
        )


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


def set_inside(cache: Any, inside: bool) -> None:
    """Tell the first layer whether the text model is running."""
    if cache is not None and getattr(cache, "layers", None) and isinstance(cache.layers[0], LogicalDynamicLayer):
        cache.layers[0].inside = inside
