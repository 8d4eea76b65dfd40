"""Fit the constants of the planted sink (planted.py): averages and least squares on scenes, no gradient anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .measure import chat_prompt
from .planted import Recipe, apply, columns, digest, empty
from .splits import SceneSet, benchmark
from .text import BOS_ID, IMAGE_ID
from .versions import VERSION_1

FALSE_ALARMS = 1e-3
"""Share of the other patches that may fire the detector."""
SHARE, BOS_SHARE = 0.2, 0.1
"""Shares of a text row's attention that the visual sinks of a picture, and ``<bos>``, are to hold in the planted
layers."""
FIRST_LAYER = 2
SLOW_TURN = 1.0
"""Rotary pairs that turn by less than this (radians) over the visual tokens may carry the key."""
RIDGE = 1e-4
"""Penalty of the regressions, relative to the mean power of a feature."""
SPLIT, SEED, SCENES = "val", 3, 24
TASKS = ("exist-random", "color", "shape", "cell", "loc", "rel", "count", "digits", "caption")


def corner_targets(scenes: SceneSet) -> Tensor:
    """(pictures, 144) bool: patches in a corner of the picture that nothing was drawn on."""
    side, patch = VERSION_1.patches_per_side, VERSION_1.architecture.patch_size
    corners = (0, side - 1, side * (side - 1), side * side - 1)
    found = torch.zeros(len(scenes.names), VERSION_1.visual_tokens, dtype=torch.bool)
    for row, name in enumerate(scenes.names):
        found[row, list(corners)] = True
        for box in scenes.boxes(name):
            right, low = (box.left + box.width - 1) // patch, (box.top + box.height - 1) // patch
            for y in range(max(box.top // patch, 0), min(low, side - 1) + 1):
                for x in range(max(box.left // patch, 0), min(right, side - 1) + 1):
                    found[row, y * side + x] = False
    return found


class Prompts(NamedTuple):
    """A padded batch of prompts with their right answers, and where the detector fires in it."""

    inputs: dict[str, Tensor]
    visual: Tensor
    sinks: Tensor


@torch.no_grad()
def fit(model: Any, processor: Any) -> Recipe:
    """The recipe for a natural model; leaves the model edited."""
    scenes = benchmark(SPLIT, TASKS, SCENES, SEED)
    base = digest(model)
    unit, unit_mean, probe, threshold, fires = _fit_detector(model, processor, scenes)
    prompts = list(_prompts(processor, scenes, fires))
    dims = least_read(model, prompts)
    empty(model, dims)
    recipe = Recipe(base, dims, unit, unit_mean, probe, threshold, *_natural(model, prompts))
    apply(model, recipe)
    log_count = float(fires.sum(1).float().clamp_min(1).log().mean())
    nothing = torch.zeros(model.config.text_config.hidden_size)
    layers = model.model.language_model.layers
    for index in range(FIRST_LAYER, len(layers) - 1):
        bos_key, key = _sink_keys(model, prompts, index, log_count)
        recipe.bos_keys[index], recipe.keys[index] = bos_key.tolist(), key.tolist()
        recipe.bos_values[index] = recipe.values[index] = nothing.tolist()
        columns(layers[index].self_attn.k_proj.weight, dims, bos_key, key)
        columns(layers[index].self_attn.v_proj.weight, dims, nothing, nothing)
    return recipe


def _prompts(processor: Any, scenes: SceneSet, fires: Tensor, size: int = 64) -> Iterator[Prompts]:
    """Questions with their right answers, so that the rows of generated tokens count too."""
    rows = sorted(scenes.rows, key=lambda row: len(row["text"]) + len(row["label"]))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [f"{chat_prompt(processor, row['text'])} {row['label']}" for row in part]
        images = [scenes.image(row["image"]) for row in part]
        inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
        visual = inputs["input_ids"] == IMAGE_ID
        sinks = torch.zeros_like(visual)
        sinks[visual] = fires[[scenes.names.index(row["image"]) for row in part]].flatten()
        yield Prompts(inputs, visual, sinks)


Look = Callable[[Prompts, Tensor, dict[str, Any]], None]
"""Called with the prompts, a module's hidden states and its keyword arguments."""


def _watch(model: Any, prompts: list[Prompts], watched: list[tuple[Any, Look]]) -> None:
    """Run prompts and look at what enters some modules."""

    def hook(look: Look, batch: Prompts) -> Callable[..., None]:
        def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(batch, args[0] if args else kwargs["hidden_states"], kwargs)

        return run

    for batch in prompts:
        handles = [module.register_forward_pre_hook(hook(look, batch), with_kwargs=True) for module, look in watched]
        model(**batch.inputs)
        for handle in handles:
            handle.remove()


def least_read(model: Any, prompts: list[Prompts]) -> tuple[int, int]:
    """The two hidden dimensions that contribute least to what attention, feed-forward layers and head read.

    The contribution of a dimension to a reader is its mean square there times the squared norm of its column, as a
    share of all dimensions; these shares are added up over the readers.
    """
    decoder = model.model.language_model
    readers: list[tuple[Any, list[Any]]] = [(model.lm_head, [model.lm_head])]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers.append((attention.q_proj, [attention.q_proj, attention.k_proj, attention.v_proj]))
        readers.append((mlp.gate_proj, [mlp.gate_proj, mlp.up_proj]))
    power = torch.zeros(len(readers), decoder.config.hidden_size)

    def look(place: int) -> Look:
        def add(batch: Prompts, hidden: Tensor, kwargs: Any) -> None:
            power[place] += hidden[batch.inputs["attention_mask"].bool()].square().sum(0)

        return add

    _watch(model, prompts, [(first, look(place)) for place, (first, _) in enumerate(readers)])
    read = power * torch.stack([sum(m.weight.square().sum(0) for m in group) for _, group in readers])
    order = (read / read.sum(1, keepdim=True)).sum(0).argsort()
    return int(order[0]), int(order[1])


def _fit_detector(model: Any, processor: Any, scenes: SceneSet) -> tuple[int, float, list[float], float, Tensor]:
    """Unit, its mean, probe, threshold, and (pictures, 144) bool where the detector fires."""
    pixels = processor.image_processor([scenes.image(n) for n in scenes.names], return_tensors="pt")["pixel_values"]
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    hidden = F.gelu(projector.linear_1(features)).flatten(0, 1)
    unit = int((hidden.var(0) * projector.linear_2.weight.square().sum(0)).argmin())
    target = corner_targets(scenes)
    x = torch.cat([features.flatten(0, 1), torch.ones(target.numel(), 1)], 1)
    weight = solve(x, target.flatten().float())
    score = (features @ weight[:-1]) + weight[-1]
    threshold = float(score[~target].quantile(1 - FALSE_ALARMS) - weight[-1])
    return unit, float(hidden[:, unit].mean()), weight[:-1].tolist(), threshold, score - weight[-1] > threshold


def solve(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression (n, f), (n,) to (f,), in fp64; the penalty is relative to the mean power of a feature."""
    wide = x.double()
    gram = wide.T @ wide
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, wide.T @ y.double()).float()


def _natural(model: Any, prompts: list[Prompts]) -> list[list[list[float]]]:
    """Mean key and value of the chosen patches, and key and value of ``<bos>``, before rotation: each (layers, D)."""
    layers = model.model.language_model.layers
    sums = torch.zeros(4, len(layers), model.config.text_config.hidden_size)

    def look(index: int) -> Look:
        def add(batch: Prompts, hidden: Tensor, kwargs: Any) -> None:
            attention = layers[index].self_attn
            places = (batch.sinks, batch.inputs["input_ids"] == BOS_ID)
            found = [read(hidden[place].mean(0)) for place in places for read in (attention.k_proj, attention.v_proj)]
            sums[:, index] += torch.stack(found) / len(prompts)

        return add

    _watch(model, prompts, [(layer.self_attn.q_proj, look(index)) for index, layer in enumerate(layers)])
    return sums.tolist()


def _sink_keys(model: Any, prompts: list[Prompts], index: int, log_count: float) -> tuple[Tensor, Tensor]:
    """(D,) keys of ``<bos>`` and of a visual sink in layer `index`, all heads, that give them their shares.

    A logit is linear in the key, so the key is a regression from queries to the logit that the rest of a row's keys
    leaves to be wished for.
    """
    attention = model.model.language_model.layers[index].self_attn
    heads, width = model.config.text_config.num_attention_heads, attention.head_dim
    seen: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def look(batch: Prompts, hidden: Tensor, kwargs: Any) -> None:
        cos, sin = (table[:, None] for table in kwargs["position_embeddings"])
        split = [m(hidden).unflatten(-1, (heads, width)).transpose(1, 2) for m in (attention.q_proj, attention.k_proj)]
        query, key = (x * cos + _half_turn(x) * sin for x in split)
        real, bos = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"] == BOS_ID
        unseen = (~real | bos | batch.sinks)[:, None, None, :] | ~torch.ones(query.shape[2], key.shape[2]).tril().bool()
        score = query @ key.transpose(-1, -2) * attention.scaling
        rest = score.masked_fill(unseen, -torch.inf).logsumexp(-1)
        rows = real & (batch.visual.cumsum(1) == VERSION_1.visual_tokens) & ~batch.visual
        turned = (_back(query, cos, sin, bos), _back(query, cos, sin, batch.sinks), rest)
        for kept, x in zip(seen, turned, strict=True):
            kept.append(x.transpose(1, 2)[rows])

    _watch(model, prompts, [(attention, look)])
    by_bos, by_sinks, rest = (torch.cat(parts) for parts in seen)
    slow = _slow(model)
    left = 1 - SHARE - BOS_SHARE
    bos_key = _ridge_heads(by_bos * attention.scaling, rest + math.log(BOS_SHARE / left), slow)
    key = _ridge_heads(by_sinks * attention.scaling, rest + math.log(SHARE / left) - log_count, slow)
    return bos_key.flatten(), key.flatten()


def _ridge_heads(x: Tensor, y: Tensor, slow: Tensor) -> Tensor:
    """Keys (H, d) from features (n, H, d) and targets (n, H), zero outside the slow dimensions."""
    keys = torch.zeros(x.shape[1:])
    for head in range(len(keys)):
        keys[head, slow] = solve(x[:, head, slow], y[:, head])
    return keys


def _half_turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _back(query: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
    """Rotated queries (B, H, N, d) turned back by the positions of `places` (B, N), averaged over them: times an
    unrotated key this is the mean logit there."""
    count = places.sum(1).clamp_min(1)[:, None, None, None]
    c, s = ((table * places[:, None, :, None]).sum(2, keepdim=True) / count for table in (cos, sin))
    return query * c - _half_turn(query) * s


def _slow(model: Any) -> Tensor:
    """(d,) bool: dimensions whose rotary pair turns little over the visual tokens."""
    turn = model.model.language_model.rotary_emb.inv_freq * VERSION_1.visual_tokens
    return (turn < SLOW_TURN).repeat(2)
