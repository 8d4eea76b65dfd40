"""A context for several questions: what the first pass left in the caches, cut down, and copies of it to go on from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from vlmattn.methods.compressor import Compressor
from vlmattn.patches import cache as caches
from vlmattn.patches.eviction import remembered
from vlmattn.patches.families.base import Family


def compress(method: Compressor, cache: caches.PlannedCache) -> None:
    """Leave of the prompt its text and the visual tokens that the method selects, in all layers, and nothing behind it.

    Args:
        method: decides which.
        cache: after the description, with the whole prompt in every layer; changed in place, its plan is replaced.
    """
    assert cache.plan is not None
    num_layers = len(cache.layers)
    importance = method.importance(remembered(method, cache, num_layers))
    plan = cache.plan.prompt_only()
    image = plan.image.where(plan.visual & plan.real, -1)
    chosen = method.select(importance[:, : plan.prompt].to(image.device), image).mask
    behind = int(cache.get_seq_length()) - plan.prompt
    DynamicCache.crop(cache, -behind)
    cache.plan = plan
    keep = (plan.real & ~plan.visual) | chosen
    caches.cut(cache, plan, dict.fromkeys(range(num_layers), keep), dict.fromkeys(range(num_layers), str(method)))


def branch(cache: caches.PlannedCache, rows: int) -> caches.PlannedCache:
    """A cache to go on from, `rows` times, while `cache` stays as it is. The tensors are shared until then."""
    assert cache.plan is not None
    twin: caches.PlannedCache = caches.PlannedCache.__new__(caches.PlannedCache)
    twin.__dict__.update(cache.__dict__)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    twin.plan = dataclasses.replace(cache.plan, steps=[])
    if rows > 1:
        twin.batch_repeat_interleave(rows)
    return twin


def positions(family: Family, model: nn.Module) -> dict[str, Any]:
    """What the model noted in its last prefill about where later positions go on."""
    multimodal = family.part(model, "multimodal")
    return {name: getattr(multimodal, name) for name in family.position_state}


@contextmanager
def going_on(family: Family, model: nn.Module, noted: dict[str, Any]) -> Iterator[None]:
    """Inside, later positions go on as `noted`; afterwards as before."""
    before, multimodal = positions(family, model), family.part(model, "multimodal")
    try:
        for name, value in noted.items():
            setattr(multimodal, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(multimodal, name, value)


def held(cache: caches.PlannedCache) -> list[int]:
    """Keys that each layer holds, of one row."""
    return [layer.keys.shape[2] if layer.is_initialized else 0 for layer in cache.layers]


def as_row(ids: torch.Tensor | list[int], like: torch.Tensor) -> torch.Tensor:
    """Token ids as `(1, n)` long beside `like`."""
    return torch.as_tensor(ids, dtype=torch.long, device=like.device).view(1, -1)
