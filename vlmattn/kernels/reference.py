"""Plain torch reference of what the plugin computes beside attention: fp32, any device, no heads x N x N tensor."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32


def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    rows: Tensor,
    *,
    over: Tensor | None = None,
    heads: bool = False,
) -> Tensor:
    """How much attention each key receives, averaged over chosen query rows and over heads.

    Args:
        query: `(B, H, R, D)`, the last R <= N rows of the sequence.
        key: `(B, Hkv, S, D)` with S >= N; keys beyond N are ignored (a static cache hands over unwritten slots).
        mask: what the model gives its attention: `(B or 1, 1, N or R, >= N)` bool (True attends) or additive, `(B, >=
            N)` valid keys, or None for plain causal.
        scaling: factor of the logits.
        rows: `(B, N)` bool, the query rows that count, all among the last R; chunks of rows in which nothing counts
            cost nothing. `(B, G, N)`: G sets of rows, each with a result of its own.
        over: `(B, N)` bool, the keys of the softmax; None: all.
        heads: whether heads are kept apart.

    Returns:
        fp32, mean over chosen rows of the softmax: `(B, H, N)`, or its mean over heads `(B, N)`, with sets of rows
        `(B, G, H, N)` or `(B, G, N)`. A row sums to 1 over its keys.
    """
    length = rows.shape[-1]
    key, first = key[:, :, :length], length - query.shape[2]
    weight = (rows.float() / rows.sum(-1, keepdim=True).clamp_min(1)).view(len(rows), -1, length)
    batch, count = query.shape[:2]
    total = query.new_zeros(batch, weight.shape[1], count if heads else 1, length, dtype=torch.float32)
    wanted = rows.reshape(-1, length).any(0).nonzero()[:, 0].tolist()
    while wanted:
        start = wanted[0]
        stop = min(start + CHUNK, wanted[-1] + 1)
        part = _probabilities(query[:, :, start - first : stop - first], key, mask, scaling, start, over).nan_to_num()
        if not heads:
            part = part.mean(1, keepdim=True)
        total += torch.einsum("bgq,bhqk->bghk", weight[..., start:stop], part)
        wanted = [row for row in wanted if row >= stop]
    total = total if heads else total[:, :, 0]
    return total if rows.ndim == 3 else total[:, 0]


def attention_given(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, count: int) -> Tensor:
    """The attention that the last `count` rows of a pass pay to every key, mean over heads.

    Args:
        query: `(B, H, R, D)`, R >= count.
        key: `(B, Hkv, S, D)`, the last R of them the rows' own.
        mask, scaling: as in `attention_received`; a mask of rows has R of them.

    Returns:
        fp32 `(B, count, S)`.
    """
    return _probabilities(query[:, :, -count:], key, mask, scaling, key.shape[2] - count, None).mean(1)


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, start: int, over: Tensor | None
) -> Tensor:
    """`(B, H, n, N)` fp32 softmax of the query rows from `start` on, `query` `(B, H, n, D)`."""
    batch, heads, count, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, heads // kv_heads * count, dim)
    logits = (rows.float() @ key.float().transpose(-1, -2)).mul_(scaling).view(batch, heads, count, length)
    if mask is not None and mask.ndim == 4:
        row = start + mask.shape[2] - length
        part = mask[:, :, row : row + count, :length]
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.float()
    else:
        position = torch.arange(length, device=key.device)
        future = position[None, :] > position[start : start + count, None]
        logits = logits.masked_fill(future, -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :length].bool(), -torch.inf)
    if over is not None:
        logits = logits.masked_fill(~over[:, None, None, :], -torch.inf)
    return logits.softmax(-1)
