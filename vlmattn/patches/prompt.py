"""The prompt of a prefill with images, read once: where its visual tokens are and what identifies its content."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.patches.families.base import Family
from vlmattn.patches.vision import content_key
from vlmattn.plan import Plan
from vlmattn.spans import Span, find_spans, image_index


def read_prompt(
    family: Family, config: Any, ids: Tensor, ahead: int, arguments: Mapping[str, Any], keys: Mapping[int, list[int]]
) -> Plan | None:
    """A fresh plan with the visual tokens of `ids` `(B, N)`; None if there are none.

    Args:
        family, config: of the wrapped model.
        ids: the prompt, padded, and `ahead` guessed tokens after it.
        ahead: how many of the last columns are guesses (assisted decoding verifies some together with the prompt).
        arguments: the text model's arguments.
        keys: content keys of the images, in batch order, by feature method.
    """
    placeholders = family.placeholders(config)
    visual = functools.reduce(torch.logical_or, [ids == token for token in placeholders])
    if not bool(visual.any()):
        return None
    if ahead and bool(visual[:, -ahead:].any()):
        raise CallError(
            f"an image lies behind the first {ids.shape[1] - ahead} columns, which were said to be the prompt: "
            "the prompt must hold all images"
        )
    mask = arguments.get("attention_mask")
    # any other mask is refused later, or leaves nothing to do
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == visual.shape else torch.ones_like(visual)
    positions = arguments.get("position_ids")
    spans = [
        tuple(dataclasses.replace(span, grid=_grid(family, config, positions, row, span)) for span in row_spans)
        for row, row_spans in enumerate(find_spans(visual, family.tokens_per_image(config)))
    ]
    plan = Plan(real, visual, image_index(spans, ids.shape[1], ids.device), spans, ahead, samples=ids.shape[0])
    wrappers = torch.tensor([*family.wrappers(config), -1], device=ids.device)
    plan.text = real & ~visual & ~torch.isin(ids, wrappers)
    if ahead:
        plan.text[:, -ahead:] = real[:, -ahead:]  # a guess is text, whatever it looks like
    if keys:
        end = ids.shape[1] - ahead
        plan.keys = _assign_keys(ids[:, :end], real[:, :end], placeholders, spans, keys)
    return plan


def _grid(family: Family, config: Any, positions: Tensor | None, row: int, span: Span) -> tuple[int, int, int] | None:
    rows = None
    if family.rope == "mrope" and positions is not None and positions.ndim == 3 and len(positions) >= 3:
        axes = positions[-3:]
        rows = axes[:, row if axes.shape[1] > 1 else 0, span.start : span.start + span.length]
    return family.grid(config, span.length, rows)


def _assign_keys(
    ids: Tensor, real: Tensor, placeholders: list[int], spans: list[tuple[Span, ...]], keys: Mapping[int, list[int]]
) -> tuple[tuple[int, ...], ...]:
    """One key per sample and image from text and pixels; beams repeat the images of their sample."""
    first = [
        [placeholders.index(int(ids[row, span.start])) for span in row_spans] for row, row_spans in enumerate(spans)
    ]
    shown = {place: sum(kind == place for row in first for kind in row) for place in range(len(placeholders))}
    keys = {place: keys.get(place, []) for place, count in shown.items() if count}
    copies = max((shown[place] // max(len(keys[place]), 1) for place in keys), default=1) or 1
    if any(shown[place] != copies * len(found) for place, found in keys.items()):
        raise CallError(
            f"{shown} images in the prompts, but { ({p: len(k) for p, k in keys.items()}) } went to the tower"
        )
    cursor = dict.fromkeys(keys, 0)
    result: list[tuple[int, ...]] = []
    for row, kinds in enumerate(first):
        if row % copies:
            result.append(result[-1])
            continue
        text = ids[row][real[row]]
        mine = []
        for kind in kinds:
            mine.append(content_key(text, keys[kind][cursor[kind]]))
            cursor[kind] += 1
        result.append(tuple(mine))
    return tuple(result)
