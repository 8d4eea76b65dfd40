"""Attention that second branches look at while a pass runs: noted for a later branch, or used to hide keys in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.methods.calibrate import Hide
from vlmattn.patches.selection import frame
from vlmattn.plan import Stage

if TYPE_CHECKING:
    from vlmattn.patches.passes import Pass


def wanted(live: Pass, index: int, stage: Stage | None) -> tuple[int, Callable[[Tensor], None] | None]:
    """Of how many of the last rows of layer `index` the attention is wanted, and who gets it."""
    program = live.program if live.prefill or live.program.branch is None else live.program.branch
    if live.prefill and program.attends:
        return live.answering, functools.partial(_note, live, index, stage)
    if program.hides is not None and index == program.hides[0] - 1 and (live.prefill or live.plan.branches > 1):
        return live.answering, functools.partial(_choose, live, program.hides[1], stage)
    return 0, None


def _note(live: Pass, index: int, stage: Stage | None, given: Tensor) -> None:
    live.plan.attended[index] = _in_prompt(live, stage, given[:, :1])[: live.plan.samples, 0]


def _choose(live: Pass, hide: Hide, stage: Stage | None, given: Tensor) -> None:
    visual = (live.plan.visual & live.plan.real).to(given.device)
    if not live.prefill:  # the rows of the first branch see everything
        visual = visual & (torch.arange(len(visual), device=given.device) >= live.plan.samples)[:, None]
    hidden = hide.choose(_in_prompt(live, stage, given), visual) & visual[:, None]
    if live.prefill:  # what the last prompt token chooses holds for all of the prompt
        rows = live.plan.length - hidden.shape[1]
        hidden = torch.cat([hidden[:, :1].expand(-1, rows, -1), hidden], 1)
    live.hidden = hidden


def _in_prompt(live: Pass, stage: Stage | None, given: Tensor) -> Tensor:
    """`(rows, q, N)`: attention to what a layer holds, by columns of the prompt; 0 where it holds nothing."""
    held = frame(live.plan, stage)
    columns, real = held.columns.to(given.device), held.real.to(given.device)
    there = given[..., : columns.shape[1]] * real[:, None]
    blank = given.new_zeros(*given.shape[:2], live.plan.length)
    return blank.scatter_add(2, columns[:, None].expand_as(there), there)


def cover(live: Pass, chosen: Tensor, stage: Stage | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask of a layer without the keys that `chosen` `(rows, q, N)` hides; a row that sees nothing sees itself.

    Args:
        live: the pass.
        chosen: by columns of the prompt.
        stage: what the layer holds.
        mask: as it was: None (causal), or `(rows or 1, 1, q, S)` bool or additive.
        hidden: `(rows, q, C)` the layer's input.

    Raises:
        CallError: the attention takes no mask for single rows.
    """
    if mask is not None and mask.ndim != 4:
        raise CallError("keys are hidden row by row, which flash attention cannot do: load the model with sdpa")
    columns = frame(live.plan, stage).columns.to(hidden.device)
    rows, queries = hidden.shape[:2]
    if live.prefill and stage is not None:  # the rows are those that the layer holds
        chosen = chosen.gather(1, columns[..., None].expand(-1, -1, chosen.shape[2]))
    covered = chosen.to(hidden.device).gather(2, columns[:, None].expand(-1, queries, -1))
    new = 0 if live.prefill else live.new
    covered = torch.nn.functional.pad(covered, (0, new))[:, None]
    size = covered.shape[3]
    own = torch.ones(queries, size, dtype=torch.bool, device=hidden.device).tril(size - queries)
    own = own & ~own.tril(size - queries - 1)
    if mask is None:
        mask = torch.ones(queries, size, dtype=torch.bool, device=hidden.device).tril(size - queries)[None, None]
    mask = mask[..., :size].expand(rows, -1, -1, -1)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    left = seen & ~covered
    left = left | (own & ~left.any(-1, keepdim=True))
    if mask.dtype == torch.bool:
        return left
    return mask.masked_fill(~left, torch.finfo(mask.dtype).min)
