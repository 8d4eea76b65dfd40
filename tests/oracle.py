"""Independent oracles: the whole sequence is recomputed at every step, one row at a time, without cache, padding or
hooks, with a softmax of our own. Slow and plain on purpose."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Prompt:
    """One unpadded row as the text model receives it.

    Attributes:
        embeds: `(n, C)`; positions: `(axes, n)`, one axis for plain rotary positions, three for M-RoPE.
        added: `(n, C)` behind each of the first layers, where the model adds features there.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    added: Sequence[Tensor] = ()


def read_prompts(model: Any, batch: dict[str, Tensor], image_token: int) -> list[Prompt]:
    """What the text model is called with under `generate`, row by row without padding."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    handle.remove()
    positions = seen["position_ids"]
    positions = positions[None] if positions.ndim == 2 else positions[-3:]
    rows = batch["input_ids"].shape[0]
    prompts = []
    for row in range(rows):
        real = batch["attention_mask"][row].bool()
        place = positions[:, row if positions.shape[1] > 1 else 0, real]
        visual = batch["input_ids"][row][real] == image_token
        prompts.append(Prompt(seen["inputs_embeds"][row][real], place, visual, _added(seen, row, real)))
    return prompts


def _added(seen: dict[str, Any], row: int, real: Tensor) -> list[Tensor]:
    """What the text model adds to one row behind its first layers."""
    found = []
    for features in seen.get("deepstack_visual_embeds") or ():
        places = seen["visual_pos_masks"]
        whole = torch.zeros_like(seen["inputs_embeds"])
        whole[places] = features
        found.append(whole[row][real])
    return found


def _rotate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _tables(text_model: Any, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    ids = positions if positions.shape[0] == 1 else positions[:, None]
    cos, sin = text_model.rotary_emb(embeds[None], ids)
    if cos.ndim == 4:  # older releases merge the three axes only inside attention
        section = text_model.config.rope_parameters["mrope_section"] * 2
        cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(t.split(section, -1))], -1) for t in (cos, sin))
    return cos[0], sin[0]


def heads(attention: Any, name: str, x: Tensor) -> Tensor:
    """`(n, H, D)`: queries (`q`), keys (`k`) or values (`v`) of `(n, C)`, normed where the model norms them."""
    projected = getattr(attention, f"{name}_proj")(x).view(len(x), -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    return projected if norm is None else norm(projected)


def behind(prompt: Prompt, index: int, hidden: Tensor, present: Sequence[int]) -> Tensor:
    """What layer `index` gives for the columns `present`, with what the model adds there to those of the prompt."""
    if index >= len(prompt.added):
        return hidden
    hidden = hidden.clone()
    for slot, column in enumerate(present):
        hidden[slot] += prompt.added[index][column] if column < len(prompt.visual) else 0.0
    return hidden


def layer_forward(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One decoder layer on `(n, C)`; returns hidden states and probabilities `(H, n, n)`."""
    attention = layer.self_attn
    n = hidden.shape[0]
    x = layer.input_layernorm(hidden)
    q, k, v = (heads(attention, name, x).transpose(0, 1) for name in "qkv")
    q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    logits = (q @ k.transpose(-1, -2)) * attention.head_dim**-0.5
    logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    probabilities = logits.softmax(-1)
    hidden = hidden + attention.o_proj((probabilities @ v).transpose(0, 1).reshape(n, -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), probabilities


@dataclass
class Run:
    """Result of an oracle run: greedy tokens, `(steps, vocabulary)` logits, and the kept columns of each stage."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)


@torch.no_grad()
def generate(
    model: Any, prompt: Prompt, stages: dict[int, Any], steps: int, follow: Sequence[int] = (), compact: bool = False
) -> Run:
    """Greedy generation where, before each layer in `stages`, prompt tokens are physically removed.

    Args:
        stages: layer -> kept prompt columns (list, prompt frame), or layer -> callable that gets the probabilities
            `(H, n, n)` of the layer before and the columns present, and returns kept columns.
        follow: tokens to append instead of the greedy ones (a second turn).
        compact: after each stage positions count from 0 without gaps.
    """
    text = model.model.language_model
    run = Run()
    embeds, positions = prompt.embeds.clone(), prompt.positions.clone()
    length = embeds.shape[0]
    for step in range(steps):
        cos, sin = _tables(text, embeds, positions)
        hidden, present = embeds, list(range(embeds.shape[0]))
        probabilities = None
        for index, layer in enumerate(text.layers):
            if index in stages:
                if index not in run.kept:
                    chosen = stages[index]
                    run.kept[index] = chosen(probabilities, present) if callable(chosen) else list(chosen)
                stays = [c for c in present if c >= length or c in set(run.kept[index])]
                slots = torch.tensor([present.index(c) for c in stays])
                hidden, cos, sin, present = hidden[slots], cos[slots], sin[slots], stays
                if compact:
                    cos, sin = _tables(text, hidden, torch.arange(len(stays))[None])
            hidden, probabilities = layer_forward(layer, hidden, cos, sin)
            hidden = behind(prompt, index, hidden, present)
        logits = model.lm_head(text.norm(hidden[-1]))
        token = follow[step] if step < len(follow) else int(logits.argmax())
        run.logits.append(logits)
        run.tokens.append(token)
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([token]))])
        positions = torch.cat([positions, positions.max() + 1 + torch.zeros_like(positions[:, -1:])], 1)
        if step > 0:
            positions[:, -1] = positions[:, -2] + 1
    return run


@torch.no_grad()
def masked_forward(model: Any, batch: dict[str, Tensor], stages: dict[int, Sequence[Sequence[int]]]) -> Tensor:
    """Logits of an unpruned run in which, from the layer of each stage on, the prompt columns that it does not keep are
    masked (but still see themselves)."""
    rows, length = batch["input_ids"].shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def mask_of(kept: Sequence[Sequence[int]]) -> Tensor:
        allowed = torch.zeros(rows, length, dtype=torch.bool)
        for row, columns in enumerate(kept):
            allowed[row, list(columns)] = True
        mask = (causal & allowed[:, None, None, :]) | torch.eye(length, dtype=torch.bool)
        if model.model.language_model.config._attn_implementation == "eager":
            return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return mask

    masks = {layer: mask_of(kept) for layer, kept in stages.items()}

    def swap(index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ruling = [layer for layer in masks if layer <= index]
        return args, kwargs | ({"attention_mask": masks[max(ruling)]} if ruling else {})

    handles = [
        module.register_forward_pre_hook(functools.partial(swap, index), with_kwargs=True)
        for index, module in enumerate(model.model.language_model.layers)
    ]
    try:
        return model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def cut_forward(model: Any, batch: dict[str, Tensor], cut: dict[int, Tensor]) -> Tensor:
    """Logits of a pass without a cache in which attention is cut in some layers.

    Args:
        cut: layer -> `(B, N, N)` bool, True where a query (second axis) must not see a key; each still sees itself.
    """
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool)
    plain = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None]

    def mask_of(pairs: Tensor) -> Tensor:
        mask = ((plain & ~pairs) | itself)[:, None]
        if model.model.language_model.config._attn_implementation == "eager":
            return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return mask

    masks = {layer: mask_of(pairs) for layer, pairs in cut.items()}

    def swap(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": masks[layer]}

    layers = model.model.language_model.layers
    handles = [layers[i].register_forward_pre_hook(functools.partial(swap, i), with_kwargs=True) for i in masks]
    try:
        return model(**batch, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def longer(batch: dict[str, Tensor], ids: Tensor, flat: bool) -> dict[str, Tensor]:
    """A batch with `ids` `(B, n)` in place of its prompts, with which they begin; what is new is text.

    Args:
        flat: whether positions have one axis, so that those of `generate` can be given.
    """
    more = batch | {"input_ids": ids}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in batch:
            new = ids.shape[1] - batch[name].shape[1]
            fill = batch[name].new_full((len(ids), new), int(name == "attention_mask"))
            more[name] = torch.cat([batch[name], fill], 1)
    if flat:
        more["position_ids"] = (more["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return more
