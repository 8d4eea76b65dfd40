"""Attention over a prompt whose segments stand side by side: fast, and as the paper says it. Plain torch, fp32.

Moving a segment back by s positions is rotating the query forward by s: `<R(p) q, R(k - s) x> = <R(p + s) q, R(k) x>`.
So keys are rotated once, and queries once for every segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Segments:
    """Where the segments are among the keys of a layer.

    Attributes:
        segment: `(B, S)` long, -1 for keys of no segment.
        real: `(B, S)` bool, False at padding.
        extent: `(B, J)` long, positions that each takes; 0 where a sample has fewer.
        cos, sin: `(B, S, D)` rotary tables of the keys, all segments up to the same position.
        frequency: `(D / 2,)` fp32, the angle of one position.
        shifts: importance `(B, H, N, J)` and `extent` to how far back each segment is moved, `(B, H, N, J)` long.
    """

    segment: Tensor
    real: Tensor
    extent: Tensor
    cos: Tensor
    sin: Tensor
    frequency: Tensor
    shifts: Callable[[Tensor, Tensor], Tensor]

    @property
    def prefix(self) -> Tensor:
        """`(B, S)` bool, keys of no segment before the last one ends."""
        behind = (self.segment.flip(1).cummax(1).values < 0).flip(1)
        return self.real & (self.segment < 0) & ~behind

    def allowed(self, rows: Tensor) -> Tensor:
        """`(B, 1, R, S)` bool, what rows `(R,)` of the keys attend to."""
        column = torch.arange(self.segment.shape[1], device=rows.device)
        causal = column <= rows[:, None]
        prefix, inside = self.prefix, self.segment >= 0
        own = self.segment[:, rows, None] == self.segment[:, None]
        from_segment = prefix[:, None] | (inside[:, None] & (~own | causal))
        seen = torch.where(inside[:, rows, None], from_segment, causal & (prefix[:, None] | ~prefix[:, rows, None]))
        return (seen & self.real[:, None])[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, where: Segments) -> tuple[Tensor, Tensor]:
    """Attention in which every query orders the segments by its own attention.

    Args:
        query: `(B, H, N, D)`, the last N of the S tokens, not rotated.
        key, value: `(B, Hkv, S, D)`, not rotated.
        scaling: factor of the scores.
        where: the segments.

    Returns:
        `(B, N, H, D)` in the dtype of `value`, and the probabilities `(B, H, S)` fp32 of the last row.
    """
    length, total = query.shape[2], key.shape[2]
    rows = torch.arange(total - length, total, device=query.device)
    shift = where.shifts(importance(query, key, scaling, where), where.extent)
    keys = rotate(key.float(), where.cos, where.sin)
    queries = rotate(query.float(), where.cos[:, rows], where.sin[:, rows])
    parts, p = [], queries
    for part in torch.arange(length, device=query.device).split(CHUNK):
        picked = queries[:, :, part]
        scores = product(picked, keys)
        for number in range(where.extent.shape[1]):
            turned = turn(picked, shift[:, :, part, number], where.frequency)
            here = (where.segment == number)[:, None, None]
            scores = torch.where(here, product(turned, keys), scores)
        p = (scores * scaling).masked_fill(~where.allowed(rows[part]), -torch.inf).softmax(-1).nan_to_num()
        parts.append(product(p, value.float().mT))
    return torch.cat(parts, 2).transpose(1, 2).to(value.dtype), p[:, :, -1]


def importance(query: Tensor, key: Tensor, scaling: float, where: Segments) -> Tensor:
    """`(B, H, N, J)` fp32: how much of a query's attention, without rotation, falls on each segment, per token.

    All queries of a segment have the sum of theirs; of their own segment it is inf, of one that is not there -inf.
    """
    count = where.extent.shape[1]
    own = where.segment[:, -query.shape[2] :]
    size = torch.stack([(where.segment == number).sum(1) for number in range(count)], 1)
    parts = []
    for part in torch.arange(query.shape[2], device=query.device).split(CHUNK):
        scores = product(query[:, :, part].float(), key.float()) * scaling
        sums = [
            scores.masked_fill((where.segment != number)[:, None, None], -torch.inf).logsumexp(-1)
            for number in range(count)
        ]
        mine = torch.nn.functional.one_hot(own[:, part].clamp_min(0), count).bool() & (own[:, part, None] >= 0)
        parts.append(torch.stack(sums, -1).masked_fill(mine[:, None], -torch.inf).softmax(-1).nan_to_num())
    share = torch.cat(parts, 2) / size.clamp_min(1)[:, None, None]
    inside = torch.nn.functional.one_hot(own.clamp_min(0), count).float() * (own >= 0)[..., None]
    of_segment = torch.einsum("bni,bhnj->bhij", inside, share)
    of_segment = of_segment.masked_fill(torch.eye(count, dtype=torch.bool, device=query.device), torch.inf)
    together = of_segment.gather(2, own.clamp_min(0)[:, None, :, None].expand_as(share))
    chosen = torch.where((own >= 0)[:, None, :, None], together, share)
    return chosen.masked_fill((size == 0)[:, None, None], -torch.inf)


def product(x: Tensor, key: Tensor) -> Tensor:
    """`(B, H, R, S)`: rows `(B, H, R, D)` times grouped keys `(B, Hkv, S, D)`."""
    batch, heads, rows, dim = x.shape
    grouped = x.reshape(batch, key.shape[1], heads // key.shape[1] * rows, dim)
    return (grouped @ key.mT).view(batch, heads, rows, key.shape[2])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`(B, H, N, D)` rotated by tables `(B, N, D)`, halves as pairs."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None].to(x) + torch.cat([-second, first], -1) * sin[:, None].to(x)


def turn(x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
    """`(B, H, N, D)` rotated by so many `positions` `(B, H, N)` more."""
    angle = positions[..., None] * frequency.to(x)
    cos, sin = angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def naive(query: Tensor, key: Tensor, value: Tensor, scaling: float, where: Segments) -> tuple[Tensor, Tensor]:
    """As `attend`, query by query as the paper says it: all keys are moved to their places and rotated there."""
    repeat = query.shape[1] // key.shape[1]
    k, v = (x.float().repeat_interleave(repeat, 1) for x in (key, value))
    first = key.shape[2] - query.shape[2]
    weights = naive_importance(query, k, scaling, where)
    shift = where.shifts(weights, where.extent)
    rotated, out, p = rotate(k, where.cos, where.sin), [], k
    for row in range(query.shape[2]):
        q = rotate(query[:, :, row : row + 1].float(), where.cos[:, first + row, None], where.sin[:, first + row, None])
        back = torch.zeros(*k.shape[:3], device=k.device)
        for number in range(where.extent.shape[1]):
            back = torch.where((where.segment == number)[:, None], -shift[:, :, row, number, None].float(), back)
        scores = (q @ turn(rotated, back, where.frequency).mT) * scaling
        allowed = where.allowed(torch.tensor([first + row], device=k.device))
        p = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        out.append(p @ v)
    return torch.cat(out, 2).transpose(1, 2).to(value.dtype), p[:, :, -1]


def naive_importance(query: Tensor, key: Tensor, scaling: float, where: Segments) -> Tensor:
    """As `importance`, sample by sample and segment by segment; `key` `(B, H, S, D)` fp32."""
    batch, heads, length, _ = query.shape
    found = torch.full((batch, heads, length, where.extent.shape[1]), -torch.inf, device=query.device)
    for sample in range(batch):
        segment = where.segment[sample]
        numbers = [n for n in range(where.extent.shape[1]) if bool((segment == n).any())]
        scores = (query[sample].float() @ key[sample].mT) * scaling
        for own in (-1, *numbers):
            rows = segment[-length:] == own
            keys = (segment >= 0) & (segment != own)
            w = scores.masked_fill(~keys, -torch.inf).softmax(-1).nan_to_num()
            for number in numbers:
                imp = w[:, rows][..., segment == number].mean(-1)
                found[sample, :, rows, number] = imp if own < 0 else imp.sum(-1, keepdim=True).expand_as(imp)
            if own >= 0:
                found[sample, :, rows, own] = torch.inf
    return found


BACKENDS = {"rows": attend, "reference": naive}
