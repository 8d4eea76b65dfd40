"""Fit the constants of the planted sink (planted.py): averages and least squares on scenes, no gradient anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .measure import chat_prompt
from .planted import Recipe, apply, attach, digest, empty, projector
from .splits import SceneSet, benchmark
from .text import ASSISTANT_ID, BOS_ID, IMAGE_ID
from .versions import Version

FALSE_ALARMS = 1e-3
"""Share of the other patches that may fire the detector."""
SHARE, BOS_SHARE = 0.2, 0.1
"""Shares of a text row's attention that the visual sinks of a picture, and ``<bos>``, are to hold in the planted
layers."""
ANSWER_WEIGHT = 4.0
"""What a row that predicts a word of the answer counts in the regressions of the keys; rows of the question count 1."""
FIRST_LAYER = 2
SLOW_TURN = 1.5
"""Rotary pairs that turn by less than this (radians) from the first visual token to the end may carry the key."""
RIDGE = 1e-4
"""Penalty of the regressions, relative to the mean power of a feature."""
SPLIT, SEED, SCENES = "val", 3, 24
TASKS = ("exist-random", "color", "shape", "cell", "loc", "rel", "next", "count", "digits", "caption")
"""As far as the world has them."""
PROBED = 120
"""Pictures that the detector is fitted on."""


def corner_targets(scenes: SceneSet, patch: int) -> list[Tensor]:
    """(visual tokens,) bool for each picture: patches in its corners with no part of an object or a plate.

    Args:
        scenes: the pictures.
        patch: width and height of a visual token in pixels.
    """
    found = []
    for name in scenes.names:
        width, height = scenes.image(name).size
        free = torch.zeros(height // patch, width // patch, dtype=torch.bool)
        free[:: len(free) - 1, :: free.shape[1] - 1] = True
        for box in scenes.boxes(name):
            right, low = (box.left + box.width - 1) // patch, (box.top + box.height - 1) // patch
            free[box.top // patch : low + 1, box.left // patch : right + 1] = False
        found.append(free.flatten())
    return found


class Prompts(NamedTuple):
    """A padded batch of prompts with their right answers, and where the detector fires in it."""

    inputs: dict[str, Tensor]
    visual: Tensor
    sinks: Tensor


@torch.no_grad()
def fit(model: Any, processor: Any, version: Version) -> Recipe:
    """The recipe for a natural model of a version; leaves the model edited."""
    world = version.world.name
    scenes = benchmark(SPLIT, TASKS, SCENES, SEED, world)
    base = digest(model)
    patch = version.architecture.patch_size * version.architecture.merge
    detector = _fit_detector(model, processor, benchmark(SPLIT, ("caption",), PROBED, SEED + 1, world), patch)
    fires = _fires(model, processor, scenes, patch, detector)
    prompts = list(_prompts(processor, scenes, fires))
    dims = least_read(model, prompts)
    empty(model, dims)
    recipe = Recipe(base, dims, *detector, *_natural(model, prompts))
    apply(model, recipe)
    log_count = sum(math.log(max(1, int(picture.sum()))) for picture in fires) / len(fires)
    nothing = [0.0] * len(recipe.values[0])
    layers = model.model.language_model.layers
    for index in range(FIRST_LAYER, len(layers) - 1):
        bos_key, key = _sink_keys(model, prompts, index, log_count)
        recipe.bos_keys[index], recipe.keys[index] = bos_key.tolist(), key.tolist()
        recipe.bos_values[index] = recipe.values[index] = nothing
        attach(layers[index].self_attn, recipe, index)
    return recipe


def _prompts(processor: Any, scenes: SceneSet, fires: Sequence[Tensor], size: int = 64) -> Iterator[Prompts]:
    """Questions with their right answers, so that the rows of generated tokens count too."""
    rows = sorted(scenes.rows, key=lambda row: len(row["text"]) + len(row["label"]))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [f"{chat_prompt(processor, row['text'])} {row['label']}" for row in part]
        images = [scenes.image(row["image"]) for row in part]
        inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
        visual = inputs["input_ids"] == IMAGE_ID
        sinks = torch.zeros_like(visual)
        sinks[visual] = torch.cat([fires[scenes.names.index(row["image"])] for row in part])
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


def projector_inputs(model: Any, pixels: Mapping[str, Tensor]) -> Tensor:
    """(visual tokens, features) what enters the projector, of all pictures, in the order of the prompt.

    A tower may hand its patches on in another order, so the projector is made to number them on the way.

    Args:
        model: the model.
        pixels: what the image processor made of the pictures.
    """
    first, second = projector(model)
    seen: list[Tensor] = []

    def number(module: Any, args: Any, out: Tensor) -> Tensor:
        rows = torch.arange(out[..., 0].numel(), dtype=out.dtype)
        return rows.view(*out.shape[:-1], 1).expand_as(out)

    handles = [first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    handles.append(second.register_forward_hook(number))
    order = torch.cat(list(model.get_image_features(**pixels).pooler_output))[:, 0].long()
    for handle in handles:
        handle.remove()
    return seen[0].flatten(0, -2)[order]


def _features(model: Any, processor: Any, scenes: SceneSet) -> Tensor:
    """What enters the projector, of all pictures of a set."""
    images = [scenes.image(name) for name in scenes.names]
    return projector_inputs(model, processor.image_processor(images, return_tensors="pt"))


class Detector(NamedTuple):
    """What the recipe knows about the detector."""

    unit: int
    unit_mean: float
    probe: list[float]
    threshold: float


def _fit_detector(model: Any, processor: Any, scenes: SceneSet, patch: int) -> Detector:
    features = _features(model, processor, scenes)
    first, second = projector(model)
    hidden = F.gelu(first(features))
    unit = int((hidden.var(0) * second.weight.square().sum(0)).argmin())
    target = torch.cat(corner_targets(scenes, patch))
    weight = solve(torch.cat([features, torch.ones(len(features), 1)], 1), target.float())[:-1]
    threshold = (features @ weight)[~target].quantile(1 - FALSE_ALARMS)
    return Detector(unit, float(hidden[:, unit].mean()), weight.tolist(), float(threshold))


def _fires(model: Any, processor: Any, scenes: SceneSet, patch: int, detector: Detector) -> list[Tensor]:
    """(visual tokens,) bool for each picture: where the detector fires."""
    score = _features(model, processor, scenes) @ torch.tensor(detector.probe)
    sizes = [len(picture) for picture in corner_targets(scenes, patch)]
    return list((score > detector.threshold).split(sizes))


def solve(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Ridge regression (n, f), (n,) to (f,), in fp64; the penalty is relative to the mean power of a feature.

    Args:
        x: (n, f) features.
        y: (n,) targets.
        weight: (n,) what each counts; None for all alike.
    """
    wide = x.double()
    weighted = wide.T if weight is None else wide.T * weight
    gram = weighted @ wide
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, weighted @ y.double()).float()


def _natural(model: Any, prompts: list[Prompts]) -> list[list[list[float]]]:
    """Mean key and value of the chosen patches, and key and value of ``<bos>``, before rotation: each (layers, K d)."""
    layers = model.model.language_model.layers
    sums = torch.zeros(4, len(layers), layers[0].self_attn.k_proj.out_features)

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
    """(K d,) keys of ``<bos>`` and of a visual sink in layer `index`, all heads, that give them their shares.

    A logit is linear in the key, so the key is a regression from queries to the logit that the rest of a row's keys
    leaves to be wished for; the query heads that share a key are regressed together.
    """
    attention = model.model.language_model.layers[index].self_attn
    width, shared = attention.head_dim, attention.num_key_value_groups
    seen: tuple[list[Tensor], ...] = ([], [], [], [])
    slow = torch.ones(width, dtype=torch.bool)

    def look(batch: Prompts, hidden: Tensor, kwargs: Any) -> None:
        cos, sin = (table[:, None] for table in kwargs["position_embeddings"])
        split = [m(hidden).unflatten(-1, (-1, width)).transpose(1, 2) for m in (attention.q_proj, attention.k_proj)]
        query, key = (x * cos + _half_turn(x) * sin for x in split)
        ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        bos = ids == BOS_ID
        unseen = (~real | bos | batch.sinks)[:, None, None, :] | ~torch.ones(query.shape[2], key.shape[2]).tril().bool()
        score = query @ key.repeat_interleave(shared, 1).transpose(-1, -2) * attention.scaling
        rest = score.masked_fill(unseen, -torch.inf).logsumexp(-1)
        rows = real & (batch.visual.cumsum(1) == batch.visual.sum(1, keepdim=True)) & ~batch.visual
        turned = (_back(query, cos, sin, bos), _back(query, cos, sin, batch.sinks), rest)
        weight = torch.where((ids == ASSISTANT_ID).cumsum(1) > 0, ANSWER_WEIGHT, 1.0)
        for kept, x in zip(seen, (*(x.transpose(1, 2) for x in turned), weight), strict=True):
            kept.append(x[rows])
        slow.logical_and_(_turn_little(cos[:, 0], sin[:, 0], batch))

    _watch(model, prompts, [(attention, look)])
    by_bos, by_sinks, rest, weight = (torch.cat(parts) for parts in seen)
    wished = rest - math.log(1 - SHARE - BOS_SHARE)
    bos_key = _ridge_heads(by_bos * attention.scaling, wished + math.log(BOS_SHARE), weight, slow, shared)
    key = _ridge_heads(by_sinks * attention.scaling, wished + math.log(SHARE) - log_count, weight, slow, shared)
    return bos_key, key


def _ridge_heads(x: Tensor, y: Tensor, weight: Tensor, slow: Tensor, shared: int) -> Tensor:
    """Keys (K d,) from features (n, H, d), targets (n, H) and weights (n,), zero outside the slow dimensions; `shared`
    query heads have a key in common."""
    keys = torch.zeros(x.shape[1] // shared, x.shape[2])
    for head, key in enumerate(keys):
        group = slice(head * shared, (head + 1) * shared)
        key[slow] = solve(x[:, group, slow].flatten(0, 1), y[:, group].flatten(), weight.repeat_interleave(shared))
    return keys.flatten()


def _half_turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _back(query: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
    """Rotated queries (B, H, N, d) turned back by the positions of `places` (B, N), averaged over them: times an
    unrotated key this is the mean logit there."""
    count = places.sum(1).clamp_min(1)[:, None, None, None]
    c, s = ((table * places[:, None, :, None]).sum(2, keepdim=True) / count for table in (cos, sin))
    return query * c - _half_turn(query) * s


def _turn_little(cos: Tensor, sin: Tensor, batch: Prompts) -> Tensor:
    """(d,) bool: dimensions whose rotary pair turns little from the first visual token of a prompt to its end."""
    start = torch.arange(len(cos)), batch.visual.int().argmax(1)
    turned = cos * cos[start][:, None] + sin * sin[start][:, None]
    behind = batch.visual.cumsum(1) > 0
    return turned[behind].amin(0) > math.cos(SLOW_TURN)
