"""Backend `rows`: a stock kernel computes all rows, the affected ones are redone here. No heads x N x N tensor.

Of a row only its probabilities over the keys are materialised, `(B, H, chunk, S)` fp32 at a time. A row whose gate is
shut keeps what the stock kernel gave, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import GROUPS, SINK_GROUPS, VISUAL_GROUPS, AttnEdit, Boost

CHUNK = 64
STATISTICS = ("visual_mass", "sink_mass", "entropy", "max")


@dataclass(frozen=True)
class Request:
    """What is asked of one attention call.

    Attributes:
        tag: `(B, S)` uint8 groups of the keys.
        active: `(B,)` bool, samples the edit may touch.
        rows: `(B, N)` bool, query rows the edit may touch.
        edit: the edit, or None.
        last: query row whose statistics are wanted (negative counts from the end), or None.
    """

    tag: Tensor
    active: Tensor
    rows: Tensor
    edit: AttnEdit | None
    last: int | None


def apply(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Redo the affected rows of a finished attention call.

    Args:
        query: `(B, H, N, D)`, rotated; key, value: `(B, Hkv, S, D)` with the last N keys belonging to the queries.
        mask: as the model gives it: `(B or 1, 1, N, S)` bool or additive, `(B, S)` valid keys, or None for causal.
        scaling: factor of the scores.
        out: `(B, N, H, D)` of the stock kernel.
        request: what to do.

    Returns:
        `(B, N, H, D)`; the same tensor object if nothing changed. And the statistics `(B, H, 4)` fp32 of row `last`,
        in the order of `STATISTICS`, from the probabilities before the edit (after score maps); None if not wanted.
    """
    length = query.shape[2]
    statistics = None
    if request.last is not None:
        last = request.last % length
        p = probabilities(query, key, mask, scaling, torch.tensor([last], device=query.device), request)
        statistics = row_statistics(p[:, :, 0], request.tag)
    if request.edit is None:
        return out, statistics
    wanted = request.rows.any(0).nonzero()[:, 0]
    if wanted.numel() == 0:
        return out, statistics
    out = out.clone()
    for rows in wanted.split(CHUNK):
        p = probabilities(query, key, mask, scaling, rows, request)
        changed, gate = edit_rows(p, request.tag, request.edit)
        new = weighted(changed, value).transpose(1, 2).to(out.dtype)
        use = (gate & touched(request, rows)[:, None]).transpose(1, 2)[..., None]
        out[:, rows] = torch.where(use, new, out[:, rows])
    return out, statistics


def touched(request: Request, rows: Tensor) -> Tensor:
    """`(B, R)` bool: which of the query rows `rows` `(R,)` the edit may touch."""
    return request.rows[:, rows] & request.active[:, None]


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor, request: Request
) -> Tensor:
    """`(B, H, R, S)` fp32 probabilities of query rows `rows` `(R,)`, after the score maps of the edit."""
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups, count = heads // kv_heads, rows.shape[0]
    picked = query[:, :, rows].reshape(batch, kv_heads, groups * count, dim)
    scores = (picked.float() @ key.float().transpose(-1, -2)).mul_(scaling).view(batch, heads, count, keys)
    allowed = (request.tag < len(GROUPS))[:, None, None, :]
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, rows, :keys]
        if part.dtype != torch.bool:
            part = part == 0
        allowed = allowed & part
    else:
        position = torch.arange(keys, device=key.device)
        allowed = allowed & (position[None, :] <= (rows + keys - length)[:, None])
    edit = request.edit
    if edit is not None and edit.maps_scores:
        mapped = map_scores(scores, request.tag, edit, allowed)
        if edit.hide:
            own = torch.arange(keys, device=key.device) == (rows + keys - length)[:, None]
            mapped = mapped.masked_fill(hidden(request.tag, edit)[:, None, None] & ~own, -torch.inf)
        edited = touched(request, rows)[:, None, :, None] & _heads(edit, heads, scores.device)[:, None, None]
        scores = torch.where(edited, mapped, scores)
    return _softmax(scores, allowed)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()


def _heads(edit: AttnEdit, count: int, device: torch.device) -> Tensor:
    """`(H,)` bool, the heads that are edited."""
    chosen = torch.full((count,), edit.heads is None, dtype=torch.bool, device=device)
    if edit.heads:
        chosen[list(edit.heads)] = True
    return chosen


def map_scores(scores: Tensor, tag: Tensor, edit: AttnEdit, allowed: Tensor) -> Tensor:
    """Score maps of an edit on `(B, H, R, S)`: group scales, the boost, an additive bias.

    Keys that are not `allowed` `(B or 1, 1, R or 1, S)` bool have no part in what heads share.
    """
    if edit.scale is not None:
        scores = scores * _per_key(edit.scale, 1.0, tag)[:, None, None, :]
    if edit.logit_strength is not None:
        strength = _per_key(edit.logit_strength, 0.0, tag)[:, None, None, :]
        if edit.head_limit:
            mass = masses(_softmax(scores, allowed), tag)[..., list(VISUAL_GROUPS)].sum(-1)
            share = mass / mass.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            strength = strength * share.clamp_max(edit.head_limit)[..., None]
        size = scores.abs().mean(1, keepdim=True) if edit.across_heads else scores.abs()
        scores = scores + strength * size
    return scores if edit.bias is None else scores + edit.bias[:, None, None, :]


def hidden(tag: Tensor, edit: AttnEdit) -> Tensor:
    """`(B, S)` bool, keys of the groups that the edited rows do not see."""
    return torch.isin(tag, torch.tensor(edit.hide, dtype=tag.dtype, device=tag.device))


def _table(values: tuple[float, ...], neutral: float, device: torch.device) -> Tensor:
    """`(G,)` fp32, the value of every group; `neutral` for those left out."""
    return torch.tensor([*values, *[neutral] * (len(GROUPS) - len(values))], dtype=torch.float32, device=device)


def _per_key(values: tuple[float, ...], neutral: float, tag: Tensor) -> Tensor:
    """`(B, S)` fp32, the group's value of every key; that of some group where the slot is not a key."""
    return _table(values, neutral, tag.device)[tag.long().clamp_max(len(GROUPS) - 1)]


def masses(p: Tensor, tag: Tensor) -> Tensor:
    """`(..., G)` mass of every group; `p` is `(B, H, ..., S)`."""
    member = torch.stack([tag == group for group in range(len(GROUPS))], -1).to(p.dtype)
    return torch.einsum("bh...s,bsg->bh...g", p, member)


def edit_rows(p: Tensor, tag: Tensor, edit: AttnEdit) -> tuple[Tensor, Tensor]:
    """The mass edit on `(B, H, R, S)`: new probabilities, and `(B, H, R)` bool where the row changed."""
    mass, tiny = masses(p, tag), torch.finfo(torch.float32).tiny
    gate = torch.full(p.shape[:-1], edit.maps_scores, dtype=torch.bool, device=p.device)
    factor = torch.ones_like(mass)
    if edit.take is not None:
        take = _table(edit.take, 0.0, p.device)
        visual = mass[..., list(VISUAL_GROUPS)].sum(-1)
        receiver = mass[..., edit.give]
        taken = (mass * take).sum(-1)
        open_ = (visual >= edit.min_visual) & (receiver >= edit.min_share * visual) & (receiver > 0) & (taken > 0)
        change = -take.expand_as(mass).clone()
        change[..., edit.give] += taken / receiver.clamp_min(tiny)
        factor = factor + torch.where(open_[..., None], change, 0.0)
        gate = gate | open_
    if edit.coefficient is not None:
        scaled = factor * _table(edit.coefficient, 1.0, p.device)
        if edit.renormalise:
            scaled = scaled / (scaled * mass).sum(-1, keepdim=True).clamp_min(tiny)
        open_ = (mass >= _table(edit.min_mass or (), 0.0, p.device)).all(-1)
        factor = torch.where(open_[..., None], scaled, factor)
        gate = gate | open_
    gate = (gate | bool(edit.boosts)) & _heads(edit, p.shape[1], p.device)[:, None]
    factor = torch.where(gate[..., None], factor, 1.0)
    padded = torch.cat([factor, torch.zeros_like(factor[..., :1])], -1)
    index = tag.long().clamp_max(len(GROUPS))[:, None, None, :].expand(*p.shape[:-1], -1)
    new = p * padded.gather(-1, index)
    for boost in edit.boosts:
        chosen = top_heads(looked(p, mass, boost), boost.share) & gate
        new = new * torch.where(chosen[..., None], boost.factor[:, None, None, :], 1.0)
    return new / new.sum(-1, keepdim=True).clamp_min(tiny) if edit.boosts else new, gate


def looked(p: Tensor, mass: Tensor, boost: Boost) -> Tensor:
    """`(B, H, R)`: how much heads look at what counts for a boost; `p` `(B, H, R, S)`, `mass` `(B, H, R, G)`."""
    total = torch.einsum("bhrs,bs->bhr", p, boost.rank)
    if not boost.within:
        return total
    return total / mass[..., list(boost.within)].sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def top_heads(value: Tensor, share: float) -> Tensor:
    """`(B, H, R)` bool, the share of the heads (rounded down, at least one) with the largest values; ties: lower."""
    count = max(int(value.shape[1] * share), 1)
    order = torch.argsort(value, dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(value, dtype=torch.bool).scatter(1, order, True)


def given(p: Tensor, tag: Tensor, boost: Boost) -> Tensor:
    """`(B, R)`: what a boost's heads give to what counts, their mean; `p` `(B, H, R, S)`."""
    chosen = top_heads(looked(p, masses(p, tag), boost), boost.share)
    total = torch.einsum("bhrs,bs->bhr", p, boost.rank)
    return (total * chosen).sum(1) / chosen.sum(1)


def weighted(p: Tensor, value: Tensor) -> Tensor:
    """`(B, H, R, D)` fp32: `p` `(B, H, R, S)` times grouped values `(B, Hkv, S, D)`."""
    batch, heads, rows, keys = p.shape
    kv_heads = value.shape[1]
    grouped = p.view(batch, kv_heads, heads // kv_heads * rows, keys)
    return (grouped @ value.float()).view(batch, heads, rows, value.shape[-1])


def row_statistics(p: Tensor, tag: Tensor) -> Tensor:
    """`(B, H, 4)` in the order of `STATISTICS` of one row of probabilities `(B, H, S)`; entropy in nats."""
    mass = masses(p, tag)
    entropy = -torch.xlogy(p, p).sum(-1)
    visual, sink = (mass[..., list(groups)].sum(-1) for groups in (VISUAL_GROUPS, SINK_GROUPS))
    return torch.stack([visual, sink, entropy, p.amax(-1)], -1)
