"""The prompt of a prefill with images, read once: where its visual tokens are and what identifies its content."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.methods.base import Look
from vlmattn.patches.families.base import Family
from vlmattn.patches.vision import content_key
from vlmattn.plan import Plan
from vlmattn.spans import Raster, Span, find_spans, image_index, lay_out, line_lengths

K = TypeVar("K")

Source = tuple[int, int]
"""Where an image went through: which feature method, and which of its images."""


@dataclass(frozen=True)
class Seen:
    """What was seen at the vision tower, by feature method.

    Attributes:
        keys: content keys of the images, in batch order.
        looks: what methods look at, a tensor `(n_i, ...)` an image.
        layouts: the grids of every image, of families that declare them.
        images: how many images were shown, if a second branch shows others.
    """

    keys: Mapping[int, Sequence[int]] = field(default_factory=dict)
    looks: Mapping[int, Mapping[Look, Sequence[Tensor]]] = field(default_factory=dict)
    layouts: Mapping[int, Sequence[tuple[Raster, ...]]] = field(default_factory=dict)
    images: Mapping[int, int] = field(default_factory=dict)

    def counts(self) -> dict[int, int]:
        """How many images went through each feature method."""
        found = {**self.images, **{place: len(keys) for place, keys in self.keys.items()}}
        return found | {place: len(next(iter(looks.values()))) for place, looks in self.looks.items()}


def read_prompt(
    family: Family, config: Any, ids: Tensor, ahead: int, arguments: Mapping[str, Any], seen: Seen
) -> Plan | None:
    """A fresh plan with the visual tokens of `ids` `(B, N)`; None if there are none.

    Args:
        family, config: of the wrapped model.
        ids: the prompt, padded, and `ahead` guessed tokens after it.
        ahead: how many of the last columns are guesses (assisted decoding verifies some together with the prompt).
        arguments: the text model's arguments.
        seen: at the vision tower, if anybody looked.
    """
    placeholders = family.placeholders(config)
    shown = [ids == token for token in placeholders]
    visual = functools.reduce(torch.logical_or, shown)
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
    if family.layouts:
        kinds = functools.reduce(
            lambda found, kind: torch.where(shown[kind], kind, found), range(len(shown)), ids * 0 - 1
        )
        spans = [tuple(row_spans) for row_spans in lay_out(kinds, seen.layouts)]
    else:
        spans = [
            tuple(
                dataclasses.replace(span, rasters=_rasters(family, config, positions, row, span)) for span in row_spans
            )
            for row, row_spans in enumerate(find_spans(visual, family.tokens_per_image(config)))
        ]
    image, newline = (of(spans, ids.shape[1], ids.device) for of in (image_index, line_lengths))
    plan = Plan(real, visual & (newline == 0), image, newline, spans, ahead, samples=ids.shape[0])
    wrappers = torch.tensor([*family.wrappers(config), -1], device=ids.device)
    plan.text = real & ~visual & ~torch.isin(ids, wrappers)
    if ahead:
        plan.text[:, -ahead:] = real[:, -ahead:]  # a guess is text, whatever it looks like
    if counts := seen.counts():
        sources = plan.sources = _sources(ids, placeholders, spans, counts)
        if seen.keys:
            end = ids.shape[1] - ahead
            texts = [row[flags] for row, flags in zip(ids[:, :end], real[:, :end], strict=True)]
            plan.keys = tuple(
                tuple(content_key(text, seen.keys[place][number]) for place, number in images)
                for text, images in zip(texts, sources, strict=True)
            )
        if seen.looks:
            plan.vision.update(spread(sources, seen.looks))
    return plan


def answered(family: Family, inputs: Mapping[str, Any], sequences: Tensor) -> dict[str, Any]:
    """The inputs of one pass over prompts and answers.

    Args:
        family: of the model.
        inputs: `input_ids` `(B, N)`, what else has a value per token, and the pixels.
        sequences: `(B, N + T)` long, the prompts and what was generated.

    Raises:
        CallError: the sequences are not these prompts and an answer.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise CallError("the inputs hold no input_ids of shape (batch, length): give what generate() was called with")
    new = sequences.shape[1] - ids.shape[1]
    if len(sequences) != len(ids) or new < 1 or not torch.equal(sequences[:, : ids.shape[1]], ids):
        raise CallError(
            f"sequences of shape {tuple(sequences.shape)} do not continue prompts of shape {tuple(ids.shape)}: give "
            "what generate() returned for these inputs, one sequence a prompt"
        )
    longer = dict(inputs)
    longer["attention_mask"] = mask = torch.cat(
        [inputs.get("attention_mask", ids != -1), ids.new_ones(len(ids), new)], 1
    )
    for name, value in inputs.items():
        if name != "attention_mask" and isinstance(value, Tensor) and value.shape == ids.shape:
            longer[name] = torch.cat([value, value.new_zeros(len(ids), new)], 1)
    longer["input_ids"] = sequences
    if family.rope == "1d":  # as generate() counts them
        longer["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return longer


def _rasters(family: Family, config: Any, positions: Tensor | None, row: int, span: Span) -> tuple[Raster, ...]:
    rows = None
    if family.rope == "mrope" and positions is not None and positions.ndim == 3 and len(positions) >= 3:
        axes = positions[-3:]
        rows = axes[:, row if axes.shape[1] > 1 else 0, span.start : span.start + span.length]
    grid = family.grid(config, span.length, rows)
    return () if grid is None else (Raster(grid),)


def _sources(
    ids: Tensor, placeholders: list[int], spans: list[tuple[Span, ...]], counts: Mapping[int, int]
) -> list[list[Source]]:
    """Where the images of every sample went through the tower; beams repeat the images of their sample."""
    kinds = [
        [placeholders.index(int(ids[row, span.start])) for span in row_spans] for row, row_spans in enumerate(spans)
    ]
    shown = {place: sum(kind == place for row in kinds for kind in row) for place in range(len(placeholders))}
    counts = {place: counts.get(place, 0) for place, count in shown.items() if count}
    copies = max((shown[place] // max(counts[place], 1) for place in counts), default=1) or 1
    if any(shown[place] != copies * count for place, count in counts.items()):
        raise CallError(f"{shown} images in the prompts, but {counts} went to the tower")
    cursor = dict.fromkeys(counts, 0)
    sources: list[list[Source]] = []
    for row, places in enumerate(kinds):
        if row % copies:
            sources.append(sources[-1])
            continue
        mine = []
        for place in places:
            mine.append((place, cursor[place]))
            cursor[place] += 1
        sources.append(mine)
    return sources


def spread(sources: Sequence[Sequence[Source]], looks: Mapping[int, Mapping[K, Sequence[Tensor]]]) -> dict[K, Tensor]:
    """What the images say, by any key, `(B, V, ...)` over the visual tokens of every sample in order, zeros behind the
    last."""
    found = {}
    for look in next(iter(looks.values())):
        images = [[looks[place][look][number] for place, number in row] for row in sources]
        like = next(image for row in images for image in row)
        rows = [torch.cat(row) if row else like[:0] for row in images]
        found[look] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return found
