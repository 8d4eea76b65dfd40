"""Prompts whose segments stand side by side: where they are, their positions, and the attention in place of the
model's.

Layers get rotary tables that rotate nothing, so that queries, keys and the cache come without rotation; the positions
are applied here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.kernels.rows import row_statistics
from vlmattn.kernels.segments import BACKENDS, Segments
from vlmattn.methods.segments import Segmenter
from vlmattn.patches.selection import frame
from vlmattn.plan import gather_rows

if TYPE_CHECKING:
    from vlmattn.patches.passes import Pass
    from vlmattn.plan import Plan

Ranges = Sequence[Sequence[tuple[int, int]]]
"""Per sample the segments as columns of the padded prompt, from and to (not included)."""


def find(plan: Plan, given: Ranges) -> None:
    """Note the segment of every token of a prompt, if a sample has at least two.

    Raises:
        CallError: the given segments are not of this batch, overlap, or lie outside the prompt.
    """
    batch = len(plan.spans)
    if given and batch % len(given):
        raise CallError(f"segments of {len(given)} samples were given, but the batch has {batch}")
    copies = batch // len(given) if given else 1
    found = [given[row // copies] for row in range(batch)] if given else _images(plan)
    segment = torch.full(plan.visual.shape, -1, dtype=torch.long)
    end = plan.length - plan.ahead
    for row, ranges in enumerate(found):
        for number, (start, stop) in enumerate(ranges if len(ranges) > 1 else ()):
            if not 0 <= start < stop <= end or bool((segment[row, start:stop] >= 0).any()):
                raise CallError(f"segment ({start}, {stop}) of sample {row} is empty, overlaps, or leaves the prompt")
            segment[row, start:stop] = number
    segment = segment.to(plan.visual.device)
    if bool(((segment >= 0) & ~plan.real).any()):
        raise CallError("a segment lies in the padding: count columns of the padded prompt")
    plan.segment = segment if bool((segment >= 0).any()) else None


def _images(plan: Plan) -> Ranges:
    """Every image with the tokens that wrap it."""
    text = plan.real & (plan.image < 0) if plan.text is None else plan.text
    wraps = (plan.real & (plan.image < 0) & ~text).tolist()
    found = []
    for row, spans in enumerate(plan.spans):
        ranges = []
        for span in spans:
            start, stop = span.start, span.start + span.columns
            start -= int(start > 0 and wraps[row][start - 1])
            ranges.append((start, stop + int(stop < plan.length and wraps[row][stop])))
        found.append(ranges)
    return found


def place(method: Segmenter, plan: Plan, position_ids: Tensor | None) -> None:
    """Choose the positions of a prompt with segments, from those of the text model's call."""
    assert plan.segment is not None
    device = plan.segment.device
    given = torch.arange(plan.length, device=device)[None] if position_ids is None else position_ids.to(device)
    given = given[None] if given.ndim == 2 else given[-3:]
    given = given.expand(-1, len(plan.segment), -1)
    plan.stacked, plan.extent = method.positions(given, plan.segment, plan.real)


def check(plan: Plan, method: Segmenter | None) -> None:
    """Raise `CallError` where a conversation goes on without the method that its cache was written by."""
    if plan.segment is not None and method is None:
        raise CallError(
            "the cache of this conversation holds keys without positions, but the method that orders its segments is "
            "no longer installed: install it again, or start with a fresh cache"
        )


def attention(
    live: Pass, index: int, hidden: Tensor, kwargs: dict[str, Any], tag: Tensor | None
) -> Callable[..., Tensor] | None:
    """What stands in place of a layer's attention, or None; takes the rotation out of its arguments.

    Args:
        tag: `(B, S)` uint8 groups of the keys, if statistics are wanted.
    """
    method, plan = live.program.segmenter, live.plan
    if method is None or plan.segment is None:
        return None
    cos, sin = kwargs["position_embeddings"]
    if not live.placed:
        _extend(live, hidden, (cos, sin))
    kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    key = (str(hidden.device), -2)
    if key not in live.memo:
        live.memo[key] = _where(live, method, hidden.device)
    put = None
    if tag is not None:
        put = functools.partial(live.statistics.__setitem__, index)
    serve = BACKENDS[live.program.backend or "rows"]
    return functools.partial(_attend, serve, live.memo[key], tag, put)


def _extend(live: Pass, hidden: Tensor, new: tuple[Tensor, Tensor]) -> None:
    """The rotary tables of all keys after this pass's tokens."""
    plan, live.placed = live.plan, True
    batch = hidden.shape[0]
    if live.prefill:
        assert plan.stacked is not None
        columns = frame(plan, plan.stage(0))[0]
        ids = gather_rows(plan.stacked, columns, dim=-1).to(hidden.device)
        plan.tables = live.decoder.merged(live.decoder.tables(hidden, ids[0] if len(ids) == 1 else ids))
        return
    assert plan.tables is not None
    kept = plan.base_length + live.new - hidden.shape[1]
    added = (table.expand(batch, -1, -1) for table in live.decoder.merged(new))
    cos, sin = (torch.cat([old[:, :kept], more.to(old)], 1) for old, more in zip(plan.tables, added, strict=True))
    plan.tables = cos, sin


def _where(live: Pass, method: Segmenter, device: torch.device) -> Segments:
    plan = live.plan
    assert plan.segment is not None and plan.tables is not None and plan.extent is not None
    columns, real = frame(plan, plan.stage(0))[:2]
    later = 0 if live.prefill else live.new
    segment = plan.segment.gather(1, columns)
    rotary: Any = operator.attrgetter(live.decoder.family.rotary)(live.decoder.text_model)
    return Segments(
        segment=torch.nn.functional.pad(segment, (0, later), value=-1).to(device),
        real=torch.nn.functional.pad(real, (0, later), value=True).to(device),
        extent=plan.extent.to(device),
        cos=plan.tables[0].to(device),
        sin=plan.tables[1].to(device),
        frequency=rotary.inv_freq.to(device),
        shifts=method.shifts,
    )


def _attend(
    serve: Callable[..., tuple[Tensor, Tensor]],
    where: Segments,
    tag: Tensor | None,
    put: Callable[[Tensor], None] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
) -> Tensor:
    out, p = serve(query, key, value, scaling, where)
    if put is not None and tag is not None:
        put(row_statistics(p, tag))
    return out
