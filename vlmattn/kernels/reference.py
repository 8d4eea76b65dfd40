"""Plain torch reference of what the plugin computes beside attention: fp32, any device, no heads x N x N tensor."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32


def attention_received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor) -> Tensor:
    """How much attention each key receives, averaged over heads and over chosen query rows.

    Args:
        query: `(B, H, N, D)`, rotated.
        key: `(B, Hkv, S, D)` with S >= N, rotated; keys beyond N are ignored (a static cache hands over unwritten
            slots).
        mask: what the model gives its attention: `(B or 1, 1, N, >= N)` bool (True attends) or additive, `(B, >= N)`
            valid keys, or None for plain causal.
        scaling: factor of the logits.
        rows: `(B, N)` bool, the query rows that count; chunks of rows in which nothing counts cost nothing.

    Returns:
        `(B, N)` fp32: mean over heads and chosen rows of the softmax over all keys. A row sums to 1 over its keys.
    """
    length = query.shape[2]
    key = key[:, :, :length]
    weight = rows.float() / rows.sum(1, keepdim=True).clamp_min(1)
    total = query.new_zeros(query.shape[0], length, dtype=torch.float32)
    wanted = rows.any(0).nonzero()[:, 0].tolist()
    while wanted:
        start = wanted[0]
        stop = min(start + CHUNK, wanted[-1] + 1)
        mean = _probabilities(query, key, mask, scaling, start, stop).mean(1)
        total += torch.einsum("bq,bqk->bk", weight[:, start:stop], mean.nan_to_num())
        wanted = [row for row in wanted if row >= stop]
    return total


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, start: int, stop: int) -> Tensor:
    """`(B, H, stop - start, N)` fp32 softmax of some query rows."""
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    rows = query[:, :, start:stop].reshape(batch, kv_heads, heads // kv_heads * (stop - start), dim)
    logits = (rows.float() @ key.float().transpose(-1, -2)).mul_(scaling).view(batch, heads, stop - start, length)
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, start:stop, :length]
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.float()
    else:
        position = torch.arange(length, device=key.device)
        future = position[None, :] > position[start:stop, None]
        logits = logits.masked_fill(future, -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :length].bool(), -torch.inf)
    return logits.softmax(-1)
