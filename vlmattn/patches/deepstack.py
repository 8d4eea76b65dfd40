"""DeepStack (Meng et al., arXiv 2406.04334): features that a model adds to its visual rows behind its first layers.

A model adds them where visual tokens stand in the prompt. They are taken out of its hands and added at the entry of the
layer behind instead, to the rows that are left there, before anybody looks at that layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import UnsupportedModelError
from vlmattn.patches.families.base import Family
from vlmattn.plan import Plan, Stage, gather_rows


def take_over(family: Family, arguments: dict[str, Any], plan: Plan, num_layers: int) -> None:
    """Move the features from the text model's `arguments` into the plan, `(B, N, C)` a layer, zeros at text.

    Raises:
        UnsupportedModelError: some belong behind the last of the `num_layers` layers, where no layer follows.
    """
    features = arguments.get(family.deepstack) if family.deepstack else None
    if features is None:
        return
    if len(features) >= num_layers:
        raise UnsupportedModelError(
            f"{family.name} adds visual features behind {len(features)} decoder layers, but this model has only "
            f"{num_layers}: one that still follows is needed"
        )
    arguments[family.deepstack] = None
    embeds: Tensor = arguments["inputs_embeds"]
    visual = plan.visual.to(embeds.device)[..., None]
    plan.added = {
        layer + 1: torch.zeros_like(embeds).masked_scatter(visual, rows.to(embeds))
        for layer, rows in enumerate(features)
    }


def add(plan: Plan, layer: int, stage: Stage | None, hidden: Tensor) -> Tensor:
    """The input `(B, M, C)` of a layer, whose tokens `stage` tells, with what belongs behind the layer before."""
    rows = plan.added.get(layer)
    if rows is None:
        return hidden
    if stage is not None:
        rows = gather_rows(rows, stage.positions.to(rows.device))
    return hidden + rows.to(hidden.device)


def merge(plan: Plan, layer: int, columns: Tensor, stays: Tensor, merged: Callable[[Tensor], Tensor]) -> None:
    """Merge the features of layers behind `layer` as the rows of its input are.

    Args:
        columns: `(B, V)` long, the prompt columns of the visual tokens that arrive.
        stays: `(B, V)` bool.
        merged: `Keep.merge`.
    """
    for later in [key for key in plan.added if key > layer]:
        rows = plan.added[later]
        where, kept = columns.to(rows.device), stays.to(rows.device)[..., None]
        values = gather_rows(rows, where)
        values = torch.where(kept, merged(values).to(rows), values)
        plan.added[later] = rows.scatter(1, where[..., None].expand_as(values), values)
