"""A decoder layer of Llama and of Qwen2.5-VL for packed questions (packing.py), in plain tensors.

Plain softmax attention: on CPUs the backward of the fused kernel is slower at this size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""
_MASKED = -1e4


SlotGroups = tuple[tuple[int, int], ...]
"""(slots, tokens per slot) of each group of slots."""


class DecoderWeights(NamedTuple):
    """Parameters of one layer."""

    norm1: Tensor
    query: Affine
    key: Affine
    value: Affine
    out: Tensor
    norm2: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) to (B, H, L, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm, computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., L, d), with cosines and sines (..., L, d) of :func:`rotary`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def affine(module: Any) -> Affine:
    """Weight and bias of a linear layer or a norm."""
    return module.weight, module.bias


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (L, 2 n) each, of positions (L, n or 1) for ``n`` inverse frequencies."""
    angles = positions.float() * frequencies.float()
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def slot_positions(start: int, slot_groups: SlotGroups) -> list[int]:
    """Positions of the tokens of all slots: each slot begins at ``start``, right behind the prefix."""
    return [start + place for slots, length in slot_groups for _ in range(slots) for place in range(length)]


def causal_masks(lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Additive causal masks, (n, n) for each length."""
    return tuple(torch.full((n, n), _MASKED).triu(1) for n in lengths)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, masks: tuple[Tensor, ...], slot_groups: SlotGroups
) -> Tensor:
    """Causal attention of a prefix and of slots that see the prefix and themselves only.

    Args:
        query: (B, H, L, d), scaled.
        key: (B, H, L, d).
        value: (B, H, L, d).
        masks: additive causal masks, (P, P) of the prefix and (l, l) of each slot group.
        slot_groups: (slots, tokens per slot) of each group.

    Returns:
        (B, H, L, d).
    """
    prefix = masks[0].shape[0]
    near_key, near_value = key[:, :, :prefix], value[:, :, :prefix]
    scores = query[:, :, :prefix] @ near_key.transpose(-1, -2) + masks[0]
    out = [torch.softmax(scores, -1) @ near_value]
    start = prefix
    for (slots, length), mask in zip(slot_groups, masks[1:], strict=True):
        part = slice(start, start + slots * length)
        start += slots * length
        q, k, v = (x[:, :, part].unflatten(2, (slots, length)) for x in (query, key, value))
        own = (q @ k.transpose(-1, -2) + mask).flatten(2, 3)
        shared = query[:, :, part] @ near_key.transpose(-1, -2)
        weights = torch.softmax(torch.cat((shared, own), -1), -1)
        mixed = (weights[..., prefix:].unflatten(2, (slots, length)) @ v).flatten(2, 3)
        out.append(weights[..., :prefix] @ near_value + mixed)
    return torch.cat(out, 2)


def decoder_layer(
    x: Tensor,
    w: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    masks: tuple[Tensor, ...],
    slot_groups: SlotGroups,
    heads: tuple[int, int],
) -> Tensor:
    """One layer over a packed sequence, (B, L, D) to (B, L, D), with ``heads`` of queries and of keys."""
    h = rms_norm(x, w.norm1)
    many, few = heads
    query = rotate(split_heads(F.linear(h, *w.query), many), cos, sin) * (x.shape[-1] // many) ** -0.5
    key = rotate(split_heads(F.linear(h, *w.key), few), cos, sin).repeat_interleave(many // few, 1)
    value = split_heads(F.linear(h, *w.value), few).repeat_interleave(many // few, 1)
    mixed = packed_attention(query, key, value, masks, slot_groups)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), w.out)
    h = rms_norm(x, w.norm2)
    return x + F.linear(F.silu(F.linear(h, w.gate)) * F.linear(h, w.up), w.down)


def decoder_weights(layer: Any) -> DecoderWeights:
    """The parameters of a stock decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderWeights(
        norm1=layer.input_layernorm.weight,
        query=affine(attention.q_proj),
        key=affine(attention.k_proj),
        value=affine(attention.v_proj),
        out=attention.o_proj.weight,
        norm2=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )
