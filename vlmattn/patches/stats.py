"""The statistics recorder: what the attention of every layer and head did, kept on the device and read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.kernels.rows import STATISTICS
from vlmattn.plan import Plan

STEP_AXES = ("step", "layer", "sample", "head")
HEAD_AXES = ("layer", "sample", "head")
TOKEN_AXES = ("token", "layer", "sample", "head")


@dataclass(frozen=True)
class Statistic:
    """A tensor with named axes.

    Attributes:
        values: fp32 on the CPU; NaN where nothing was measured.
        axes: a name per dimension.
    """

    values: Tensor
    axes: tuple[str, ...]

    def mean(self, *over: str) -> Statistic:
        """The mean over some axes, NaN left out.

        Raises:
            ValueError: there is no such axis.
        """
        unknown = set(over) - set(self.axes)
        if unknown:
            raise ValueError(f"no axis {sorted(unknown)}: this statistic has {', '.join(self.axes)}")
        dims = [self.axes.index(name) for name in over]
        return Statistic(self.values.nanmean(dims), tuple(name for name in self.axes if name not in over))


def per_token(plan: Plan, num_layers: int) -> Statistic:
    """The divergence of every head at the prompt's last token and all after it but the last, if it was asked for."""
    table = [plan.token_divergences[layer].cpu() for layer in range(num_layers)]
    return Statistic(torch.stack(table).permute(2, 0, 1, 3)[:-1], TOKEN_AXES)


def collect(plan: Plan, num_layers: int) -> Mapping[str, Statistic]:
    """All statistics of one generation, by name.

    Per step (0 is the prompt's last token), layer, sample and head: `visual_mass`, `sink_mass` (0 where no sinks are
    tagged), `entropy` in nats and `max`. Per layer, sample and head, if heads were reinforced: `gain` and `divergence`.
    """
    found: dict[str, Statistic] = {}
    if plan.steps:
        rows = min(next(iter(step.values())).shape[0] for step in plan.steps)
        blank = torch.full_like(next(iter(plan.steps[0].values()))[:rows], torch.nan)
        stacked = torch.stack(
            [
                torch.stack([step.get(n, blank)[:rows].to(blank.device) for n in range(num_layers)])
                for step in plan.steps
            ]
        ).cpu()
        found |= {name: Statistic(stacked[..., i], STEP_AXES) for i, name in enumerate(STATISTICS)}
    for name, table in (("gain", plan.gains), ("divergence", plan.divergences)):
        if table:
            blank = torch.full_like(next(iter(table.values())), torch.nan)
            values = torch.stack([table.get(layer, blank).to(blank.device) for layer in range(num_layers)])
            found[name] = Statistic(values.float().cpu(), HEAD_AXES)
    return found
