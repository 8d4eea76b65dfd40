"""Backend `reference`: the oracle of all edits. Naive, fp32, the whole matrix, one group and one rule at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.edits import GROUPS, VISUAL, VISUAL_SINK, AttnEdit
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
    mapped = scores if edit is None else torch.where(touched[:, None, :, None], _scores(scores, request, edit), scores)
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
        "visual_mass": (mass[2] + mass[3])[:, :, row],
        "sink_mass": (mass[1] + mass[3])[:, :, row],
        "entropy": -(plain * log).sum(-1)[:, :, row],
        "max": plain.amax(-1)[:, :, row],
    }
    return result, torch.stack([found[name] for name in STATISTICS], -1)


def _scores(scores: Tensor, request: Request, edit: AttnEdit) -> Tensor:
    tag = request.tag[:, None, None, :]
    for group, factor in enumerate(edit.scale or ()):
        scores = torch.where(tag == group, scores * factor, scores)
    boosted = scores + edit.logit_strength * scores.abs()
    scores = torch.where((tag == VISUAL) | (tag == VISUAL_SINK), boosted, scores)
    if edit.bias is not None:
        scores = scores + edit.bias[:, None, None, :]
    queries, keys = scores.shape[-2:]
    itself = torch.eye(keys, dtype=torch.bool, device=scores.device)[keys - queries :]
    for group in edit.hide:
        scores = torch.where((tag == group) & ~itself, -torch.inf, scores)
    return scores


def _edited(p: Tensor, mass: list[Tensor], member: list[Tensor], edit: AttnEdit) -> Tensor:
    if edit.take is not None:
        visual, receiver = mass[VISUAL] + mass[VISUAL_SINK], mass[edit.give]
        omega = sum((share * m for share, m in zip(edit.take, mass, strict=True)), torch.zeros_like(visual))
        gate = (visual >= edit.min_visual) & (receiver >= edit.min_share * visual) & (receiver > 0) & (omega > 0)
        new = p
        for group, share in enumerate(edit.take):
            new = torch.where(member[group], new * (1.0 - share), new)
        given = omega[..., None] * p / receiver.clamp_min(1e-30)[..., None]
        new = torch.where(member[edit.give], new + given, new)
        p = torch.where(gate[..., None], new, p)
    if edit.coefficient is not None:
        for group, factor in enumerate(edit.coefficient):
            p = torch.where(member[group], p * factor, p)
        if edit.renormalise:
            p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    return p
