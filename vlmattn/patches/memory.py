"""Retracing: what a pass notes of its uncertainty, and what becomes of the feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.methods.memory import Retracing
from vlmattn.patches.selection import frame
from vlmattn.plan import Plan

if TYPE_CHECKING:
    from vlmattn.patches.passes import Pass


def remember(plan: Plan, embeds: Tensor) -> None:
    """Keep the visual rows `(B, V, C)` of the text model's input `(B, N, C)`, zeros where a prompt has fewer."""
    visual = frame(plan, None).imagery.to(embeds.device)
    rows = [row[flags] for row, flags in zip(embeds, visual, strict=True)]
    plan.memory = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def look(live: Pass, method: Retracing, index: int, hidden: Tensor) -> None:
    """Decide by the input `(B, M, C)` of layer `index` whether it is mixed; a token is at most once in a pass."""
    head: Any = live.decoder.model
    logits = head.lm_head(live.decoder.norms(index)["final"](hidden[:, -live.answering :]))
    before = live.mixing.values()
    unsure = method.unsure(logits)
    for earlier in before:
        unsure = unsure & ~earlier.to(unsure.device)
    live.mixing[index] = unsure


def mix(live: Pass, method: Retracing, index: int, entering: Tensor, leaving: Tensor) -> Tensor | None:
    """The output `(B, M, C)` of the feed-forward network of layer `index`, or None to leave it."""
    unsure, memory, plan = live.mixing.get(index), live.plan.memory, live.plan
    if unsure is None or memory is None or memory.shape[1] == 0:
        return None
    rows = leaving.shape[1] - unsure.shape[1]
    chosen = torch.cat([unsure[:, :1].expand(-1, rows), unsure], 1) if rows else unsure
    chosen = chosen.to(leaving.device)
    together = torch.zeros_like(chosen)
    if live.prefill:
        together = frame(plan, plan.stage(index)).real.to(leaving.device).clone()
        if live.ahead:
            together[:, -live.ahead :] = False
    new = method.mixed(entering, leaving, memory.to(leaving), together)
    return torch.where(chosen[..., None], new, leaving)
