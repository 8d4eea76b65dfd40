"""Backend `reference`: the oracle of all edits. Naive, fp32, the whole matrix, one group and one rule at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.edits import GROUPS, SINK_GROUPS, VISUAL_GROUPS, AttnEdit
from vlmattn.kernels.rows import STATISTICS, Request


def apply(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Attention with the edit of `request`, every row from scratch; arguments and results as in `rows.apply`.

    `out` gives only the dtype.
    """
    heads, length = query.shape[1:3]
    keys = key.shape[2]
    repeat = heads // key.shape[1]
    k, v = (x.float().repeat_interleave(repeat, 1) for x in (key, value))
    scores = torch.einsum("bhnd,bhsd->bhns", query.float(), k) * scaling
    allowed = torch.ones(length, keys, dtype=torch.bool, device=key.device).tril(keys - length)[None, None]
    if mask is not None and mask.ndim == 4:
        allowed = mask[..., :keys] if mask.dtype == torch.bool else mask[..., :keys] == 0
    allowed = allowed & (request.tag != 255)[:, None, None, :]
    touched = request.rows & request.active[:, None]
    edit = request.edit
    mapped = (
        scores
        if edit is None
        else torch.where(touched[:, None, :, None], _scores(scores, allowed, request, edit), scores)
    )
    plain = mapped.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    member = [(request.tag == group)[:, None, None, :] for group in range(len(GROUPS))]
    mass = [torch.where(m, plain, 0.0).sum(-1) for m in member]
    final = plain if edit is None else torch.where(touched[:, None, :, None], _edited(plain, mass, member, edit), plain)
    result = torch.einsum("bhns,bhsd->bnhd", final, v).to(out.dtype)
    if request.last is None:
        return result, None
    row = request.last % length
    log = torch.where(plain > 0, plain, 1.0).log()
    found = {
        "visual_mass": _total(mass, VISUAL_GROUPS)[:, :, row],
        "sink_mass": _total(mass, SINK_GROUPS)[:, :, row],
        "entropy": -(plain * log).sum(-1)[:, :, row],
        "max": plain.amax(-1)[:, :, row],
    }
    return result, torch.stack([found[name] for name in STATISTICS], -1)


def _total(mass: list[Tensor], groups: tuple[int, ...]) -> Tensor:
    return torch.stack([mass[group] for group in groups]).sum(0)


def _scores(scores: Tensor, allowed: Tensor, request: Request, edit: AttnEdit) -> Tensor:
    tag, new = request.tag[:, None, None, :], scores
    for group, factor in enumerate(edit.scale or ()):
        new = torch.where(tag == group, new * factor, new)
    louder = torch.ones_like(new[..., :1])
    if edit.head_limit:
        plain = new.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        mass = _total([torch.where(tag == group, plain, 0.0).sum(-1) for group in range(len(GROUPS))], VISUAL_GROUPS)
        share = mass * mass.shape[1] / mass.sum(1, keepdim=True).clamp_min(1e-30)
        louder = torch.minimum(share, torch.full_like(share, edit.head_limit))[..., None]
    size = new.abs()
    if edit.across_heads:
        size = size.mean(1, keepdim=True).expand_as(size)
    for group, strength in enumerate(edit.logit_strength or ()):
        new = torch.where(tag == group, new + strength * louder * size, new)
    if edit.bias is not None:
        new = new + edit.bias[:, None, None, :]
    queries, keys = scores.shape[-2:]
    itself = torch.eye(keys, dtype=torch.bool, device=scores.device)[keys - queries :]
    for group in edit.hide:
        new = torch.where((tag == group) & ~itself, -torch.inf, new)
    return _only(edit, new, scores)


def _only(edit: AttnEdit, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the heads that are edited, `old` in the others."""
    if edit.heads is None:
        return new
    kept = old.clone()
    for head in edit.heads:
        kept[:, head] = new[:, head]
    return kept


def _edited(p: Tensor, mass: list[Tensor], member: list[Tensor], edit: AttnEdit) -> Tensor:
    old = p
    if edit.take is not None:
        visual, receiver = _total(mass, VISUAL_GROUPS), mass[edit.give]
        omega = sum((share * m for share, m in zip(edit.take, mass, strict=False)), torch.zeros_like(visual))
        gate = (visual >= edit.min_visual) & (receiver >= edit.min_share * visual) & (receiver > 0) & (omega > 0)
        new = p
        for group, share in enumerate(edit.take):
            new = torch.where(member[group], new * (1.0 - share), new)
        given = omega[..., None] * p / receiver.clamp_min(1e-30)[..., None]
        new = torch.where(member[edit.give], new + given, new)
        p = torch.where(gate[..., None], new, p)
    if edit.coefficient is not None:
        new = p
        for group, factor in enumerate(edit.coefficient):
            new = torch.where(member[group], new * factor, new)
        if edit.renormalise:
            new = new / new.sum(-1, keepdim=True).clamp_min(1e-30)
        for group, least in enumerate(edit.min_mass or ()):
            new = torch.where((mass[group] >= least)[..., None], new, p)
        p = new
    for boost in edit.boosts:
        value = (old * boost.rank[:, None, None, :]).sum(-1)
        if boost.within:
            value = value / _total(mass, boost.within).clamp_min(1e-30)
        p = torch.where(_best(value, boost.share)[..., None], p * boost.factor[:, None, None, :], p)
    if edit.boosts:
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    return _only(edit, p, old)


def _best(value: Tensor, share: float) -> Tensor:
    """`(B, H, R)` bool, heads that fewer than a share of the others beat; of equal ones the lower head beats."""
    heads = value.shape[1]
    chosen = torch.zeros_like(value, dtype=torch.bool)
    for head in range(heads):
        above = (value > value[:, head : head + 1]).sum(1) + (value[:, :head] == value[:, head : head + 1]).sum(1)
        chosen[:, head] = above < max(int(heads * share), 1)
    return chosen
