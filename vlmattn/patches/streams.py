"""A second stream beside the prompt: the same text without its images, as further rows of the same forward pass.

It runs during the prefill only. Its rows are left-padded to the prompt's width, so both streams end in the same column.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vlmattn.plan import Plan, compact, gather_rows


def double(plan: Plan, arguments: dict[str, Any]) -> Plan:
    """Append the text-only rows to the text model's `arguments`; returns the plan of all `2B` rows.

    Args:
        plan: of the `B` prompts, with `text`.
        arguments: `inputs_embeds` `(B, N, C)`, `attention_mask` `(B, N)` or None, `position_ids` `(B or 1, N)`,
            `(axes, B, N)` or None; replaced in place.
    """
    embeds: Tensor = arguments["inputs_embeds"]
    batch, length, _ = embeds.shape
    alone, real = text_alone(plan, embeds)
    missing = length - alone.shape[1]
    alone, real = torch.nn.functional.pad(alone, (0, 0, missing, 0)), torch.nn.functional.pad(real, (missing, 0))
    mask = arguments.get("attention_mask")
    mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device) if mask is None else mask
    arguments["inputs_embeds"] = torch.cat([embeds, alone])
    arguments["attention_mask"] = torch.cat([mask, real.to(mask.device, mask.dtype)])
    given, counted = arguments.get("position_ids"), counted_positions(real.to(embeds.device))
    if given is None:
        given = torch.arange(length, device=embeds.device)[None]
    given = given.expand(*given.shape[:-2], batch, -1)
    arguments["position_ids"] = torch.cat([given, counted.expand_as(given)], -2)
    return dataclasses.replace(
        plan,
        samples=batch,
        real=torch.cat([plan.real, real]),
        visual=torch.cat([plan.visual, torch.zeros_like(real)]),
        image=torch.cat([plan.image, torch.full_like(plan.image, -1)]),
        newline=torch.cat([plan.newline, torch.zeros_like(plan.newline)]),
        text=None,
        spans=[*plan.spans, *([()] * batch)],
        keys=None if plan.keys is None else (*plan.keys, *([()] * batch)),
        paired=None if plan.paired is None else plan.paired.rows(torch.arange(batch).repeat(2)),
        segment=None if plan.segment is None else torch.cat([plan.segment, torch.full_like(plan.segment, -1)]),
        evidence=None if plan.evidence is None else torch.cat([plan.evidence, torch.zeros_like(plan.evidence)]),
        attended={layer: torch.cat([paid, torch.zeros_like(paid)]) for layer, paid in plan.attended.items()},
        vision={look: torch.cat([values, torch.zeros_like(values)]) for look, values in plan.vision.items()},
    )


def text_alone(plan: Plan, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts without their images, left-padded: rows `(B, M, C)` of `embeds` `(B, N, C)`, and `(B, M)` bool."""
    text = plan.real & (plan.image < 0) if plan.text is None else plan.text
    index, valid = compact(text)
    real = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    return gather_rows(embeds, index.to(embeds.device)) * real.to(embeds.device, embeds.dtype)[..., None], real


def counted_positions(real: Tensor) -> Tensor:
    """`(B, M)` long, the positions of text that counts from 0; `real` `(B, M)` bool is False at padding."""
    return (real.long().cumsum(1) - 1).clamp_min(0)


def first_rows(output: Any, rows: int) -> Any:
    """The text model's output without the second stream."""
    if isinstance(output, tuple):
        return (output[0][:rows], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:rows]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(state[:rows] for state in output.hidden_states)
    return output
