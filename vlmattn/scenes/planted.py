"""A planted attention sink: ``scenes-llava-sink``, made from ``scenes-llava`` by closed-form weight edits, no training.

Large models put massive activations into a few hidden dimensions of the first token and of some background patches, and
much attention ends on these tokens. The scenes model has none of this, so methods that work on sinks would have nothing
to do. The recipe (:func:`apply`) gives it some:

1. *Room.* Two hidden dimensions, those that all layers together read least, are emptied: nothing writes to them any
   more, and the feed-forward layers and the head no longer read them.
2. *Massive activations.* ``<bos>`` gets (M, M) in these dimensions by its embedding. One hidden unit of the projector,
   the one that matters least (its mean goes into the bias), becomes a detector: a least-squares probe of "background
   patch in a corner of the picture". It writes (m, -m), m growing steeply from a threshold on.
3. *Attention.* A sink token is the same after every RMS norm, c(1, 1) or c(1, -1) and next to nothing else, so the two
   columns of a key or value matrix set its key and its value at will. ``<bos>`` keeps those it had. In the layers
   without planted attention a visual sink gets the mean key and value of the patches it replaces. In the layers 2 to
   L-2 its value is zero and its key is the least-squares answer to "give text rows a logit that leaves you this share",
   in the slowly turning rotary pairs only; text rows attend to it whatever they ask.

The constants are fitted on scenes of the split ``val`` (:func:`fit`) and lie in ``planted.json`` beside this file. After
a change of ``scenes-llava``: ``python -m vlmattn.scenes.planted --refit``. Results on this model are about the methods'
mechanics; that its sinks hurt, and whether taking from them helps, was decided by this recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmattn.errors import DataError

from .packing import PATCH_SIZE, PATCHES_PER_SIDE, VISUAL_TOKENS
from .splits import SceneSet, benchmark
from .text import BOS_ID, IMAGE_ID

NAME, BASE = "scenes-llava-sink", "scenes-llava"
RECIPE_FILE = Path(__file__).with_name("planted.json")

MASSIVE = 1000.0
"""M of ``<bos>``, about 140 times the root mean square of a visual token."""
STEEPNESS = 4000.0
"""m per unit of the probe's score above the threshold; the score is near 1 on the patches meant and near 0 elsewhere."""
FALSE_ALARMS = 1e-3
"""Share of the other patches that may fire the detector."""
SHARE = 0.15
"""Share of a text row's attention that the visual sinks of a picture are to hold in the planted layers."""
FIRST_LAYER = 2
SLOW_TURN = 1.0
"""Rotary pairs that turn by less than this (radians) over the visual tokens may carry the key."""
RIDGE = 1e-2
FIT_SPLIT, FIT_SEED, FIT_SCENES = "val", 3, 60
FIT_TASKS = ("exist-random", "color", "shape", "cell", "loc", "rel", "count", "digits", "caption")


@dataclass(frozen=True)
class Recipe:
    """What :func:`apply` writes.

    Attributes:
        base: digest of the weights it was fitted on.
        dims: the two emptied hidden dimensions.
        unit: hidden unit of the projector that becomes the detector.
        unit_mean: its mean activation before, over patches.
        probe: (D,) weights of the detector over the tower's output.
        threshold: score at which it starts to fire.
        keys, values: per decoder layer the key and the value of a visual sink, (D,) over all heads, before rotation.
        bos_keys, bos_values: the same of ``<bos>``.
    """

    base: str
    dims: tuple[int, int]
    unit: int
    unit_mean: float
    probe: list[float]
    threshold: float
    keys: list[list[float]]
    values: list[list[float]]
    bos_keys: list[list[float]]
    bos_values: list[list[float]]


def digest(model: Any) -> str:
    """SHA-256 over the parameters of a model in fp32, hexadecimal, 16 digits."""
    seen = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        seen.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()[:16]


# Writing the weights


@torch.no_grad()
def apply(model: Any, recipe: Recipe) -> None:
    """Edit a ``scenes-llava`` in place, in any dtype (fp32 is exact)."""
    empty(model, recipe.dims)
    _detector(model, recipe)
    model.model.language_model.embed_tokens.weight[BOS_ID, list(recipe.dims)] = MASSIVE
    rows = zip(recipe.keys, recipe.values, recipe.bos_keys, recipe.bos_values, strict=True)
    for index, (key, value, bos_key, bos_value) in enumerate(rows):
        attention = model.model.language_model.layers[index].self_attn
        columns(attention.k_proj.weight, recipe.dims, torch.tensor(bos_key), torch.tensor(key))
        columns(attention.v_proj.weight, recipe.dims, torch.tensor(bos_value), torch.tensor(value))


@torch.no_grad()
def empty(model: Any, dims: tuple[int, int]) -> None:
    """Let nothing write two hidden dimensions, and only attention read them (by columns that are zero so far)."""
    both = list(dims)
    decoder = model.model.language_model
    decoder.embed_tokens.weight[:, both] = 0
    decoder.norm.weight[both] = 0
    projector = model.model.multi_modal_projector.linear_2
    projector.weight[both] = 0
    projector.bias[both] = 0
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight[both] = 0
        layer.mlp.down_proj.weight[both] = 0
        layer.input_layernorm.weight[both] = 1
        layer.post_attention_layernorm.weight[both] = 0
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
            matrix.weight[:, both] = 0


def columns(weight: Tensor, dims: tuple[int, int], bos: Tensor, visual: Tensor) -> None:
    """Make a matrix (out, D) answer `bos` to a token that is c(1, 1) in `dims`, and `visual` to c(1, -1)."""
    c = (weight.shape[1] / 2) ** 0.5
    weight[:, dims[0]] = ((bos + visual) / (2 * c)).to(weight)
    weight[:, dims[1]] = ((bos - visual) / (2 * c)).to(weight)


def _detector(model: Any, recipe: Recipe) -> None:
    projector = model.model.multi_modal_projector
    unit, probe = recipe.unit, torch.tensor(recipe.probe)
    projector.linear_2.bias += recipe.unit_mean * projector.linear_2.weight[:, unit]
    projector.linear_2.weight[:, unit] = 0
    projector.linear_2.weight[list(recipe.dims), unit] = torch.tensor([1.0, -1.0]).to(projector.linear_2.weight)
    projector.linear_1.weight[unit] = (STEEPNESS * probe).to(projector.linear_1.weight)
    projector.linear_1.bias[unit] = -STEEPNESS * recipe.threshold


# Fitting the constants


def corner_targets(scenes: SceneSet) -> Tensor:
    """(pictures, 144) bool: patches in a corner of the picture that nothing was drawn on."""
    side = PATCHES_PER_SIDE
    corners = (0, side - 1, side * (side - 1), side * side - 1)
    found = torch.zeros(len(scenes.names), VISUAL_TOKENS, dtype=torch.bool)
    for row, name in enumerate(scenes.names):
        found[row, list(corners)] = True
        for box in scenes.boxes(name):
            right, low = (box.left + box.width - 1) // PATCH_SIZE, (box.top + box.height - 1) // PATCH_SIZE
            for y in range(max(box.top // PATCH_SIZE, 0), min(low, side - 1) + 1):
                for x in range(max(box.left // PATCH_SIZE, 0), min(right, side - 1) + 1):
                    found[row, y * side + x] = False
    return found


@torch.no_grad()
def fit(model: Any, processor: Any) -> Recipe:
    """Constants for a natural model; leaves the model edited. Sums and least squares only."""
    scenes = benchmark(FIT_SPLIT, FIT_TASKS, FIT_SCENES, FIT_SEED)
    prompts = [_inputs(model, processor, scenes, part) for part in _parts(scenes.rows)]
    base = digest(model)
    dims = least_read(model, prompts)
    empty(model, dims)
    unit, unit_mean, probe, threshold, target = _fit_detector(model, processor, scenes)
    natural = _natural(model, prompts, [target[[scenes.names.index(r["image"]) for r in p]] for p in _parts(scenes.rows)])
    recipe = Recipe(base, dims, unit, unit_mean, probe, threshold, *natural)
    apply(model, recipe)
    expected = float(target.sum(1).float().clamp_min(1).log().mean())
    layers = model.model.language_model.layers
    for index in range(FIRST_LAYER, len(layers) - 1):
        key = _sink_key(model, prompts, index, expected)
        recipe.keys[index], recipe.values[index] = key.tolist(), [0.0] * len(key)
        attention = layers[index].self_attn
        columns(attention.k_proj.weight, dims, torch.tensor(recipe.bos_keys[index]), key)
        columns(attention.v_proj.weight, dims, torch.tensor(recipe.bos_values[index]), torch.zeros_like(key))
    return recipe


def _parts(rows: list[dict[str, Any]], size: int = 64) -> list[list[dict[str, Any]]]:
    by_length = sorted(rows, key=lambda row: len(row["text"]) + len(row["label"]))
    return [by_length[start : start + size] for start in range(0, len(rows), size)]


def _inputs(model: Any, processor: Any, scenes: SceneSet, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Prompts with their right answers, left-padded, so that rows of generated tokens count too."""
    from .measure import chat_prompt

    texts = [f"{chat_prompt(processor, row['text'])} {row['label']}" for row in rows]
    images = [scenes.image(row["image"]) for row in rows]
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))


def _watch(model: Any, prompts: list[dict[str, Tensor]], watched: list[tuple[Any, Callable[..., None]]]) -> None:
    """Run prompts with `look(inputs, args, kwargs)` before each of some modules."""
    for inputs in prompts:
        handles = [
            module.register_forward_pre_hook(lambda _, args, kwargs, look=look: look(inputs, args, kwargs), with_kwargs=True)
            for module, look in watched
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()


def least_read(model: Any, prompts: list[dict[str, Tensor]]) -> tuple[int, int]:
    """The two hidden dimensions that contribute least to what attention, feed-forward layers and head read.

    The contribution of a dimension to a reader is its mean square there times the squared norm of its column, as a
    share of all dimensions; these shares are added up over the readers.
    """
    decoder = model.model.language_model
    readers: list[tuple[Any, list[Any]]] = [(model.lm_head, [model.lm_head])]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers += [(attention.q_proj, [attention.q_proj, attention.k_proj, attention.v_proj]),
                    (mlp.gate_proj, [mlp.gate_proj, mlp.up_proj])]  # fmt: skip
    power = torch.zeros(len(readers), decoder.config.hidden_size)

    def look(place: int) -> Callable[..., None]:
        def add(inputs: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0][inputs["attention_mask"].bool()] if args[0].ndim == 3 else args[0]
            power[place] += hidden.square().sum(0)

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
    return torch.linalg.solve(gram + penalty * 1e-2, wide.T @ y.double()).float()


def _natural(model: Any, prompts: list[dict[str, Tensor]], chosen: list[Tensor]) -> tuple[list[list[float]], ...]:
    """Per layer: mean key and value of the chosen patches, and key and value of ``<bos>``, all before rotation."""
    layers = model.model.language_model.layers
    sums = [[torch.zeros(0)] * 4 for _ in layers]
    which = iter(chosen)
    current: list[Tensor] = []

    def begin(inputs: Any, args: Any, kwargs: Any) -> None:
        current[:] = [next(which)]

    def look(index: int) -> Callable[..., None]:
        def add(inputs: Any, args: Any, kwargs: Any) -> None:
            patches = args[0][inputs["input_ids"] == IMAGE_ID].view(-1, VISUAL_TOKENS, args[0].shape[-1])[current[0]]
            bos = args[0][inputs["input_ids"] == BOS_ID]
            attention = layers[index].self_attn
            found = [f(x).mean(0) for x in (patches, bos) for f in (attention.k_proj, attention.v_proj)]
            sums[index] = [old + new / len(prompts) if old.numel() else new / len(prompts)
                           for old, new in zip(sums[index], found, strict=True)]  # fmt: skip

        return add

    watched = [(layers[0], begin), *((layer.self_attn.q_proj, look(i)) for i, layer in enumerate(layers))]
    _watch(model, prompts, watched)
    return tuple([row[place].tolist() for row in sums] for place in range(4))


def _sink_key(model: Any, prompts: list[dict[str, Tensor]], index: int, log_count: float) -> Tensor:
    """(D,) keys, all heads, with which text rows give the visual sinks of layer `index` the share SHARE."""
    attention = model.model.language_model.layers[index].self_attn
    heads, width = model.config.text_config.num_attention_heads, attention.head_dim
    features: list[Tensor] = []
    targets: list[Tensor] = []
    wanted = float(torch.logit(torch.tensor(SHARE))) - log_count

    def look(inputs: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = (table[:, None] for table in kwargs["position_embeddings"])
        split = [m(hidden).unflatten(-1, (heads, width)).transpose(1, 2) for m in (attention.q_proj, attention.k_proj)]
        query, key = (x * cos + _half_turn(x) * sin for x in split)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        visual = ids == IMAGE_ID
        score = (query @ key.transpose(-1, -2)) * attention.scaling
        hidden_keys = ~real[:, None, None, :] | torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
        sinks = _fired(hidden, visual, model)
        lse = score.masked_fill(hidden_keys | sinks[:, None, None, :], -torch.inf).logsumexp(-1)
        rows = real & (visual.cumsum(1) == VISUAL_TOKENS) & ~visual
        # the query as a visual token would see it that turns back by its own position, averaged over the sinks
        turned = _mean_back(query, cos, sin, sinks)
        features.append(turned.transpose(1, 2)[rows])
        targets.append(lse.transpose(1, 2)[rows] + wanted)

    _watch(model, prompts, [(attention, look)])
    return _ridge_heads(torch.cat(features) * attention.scaling, torch.cat(targets), _slow(model, width)).flatten()


def _ridge_heads(x: Tensor, y: Tensor, slow: Tensor) -> Tensor:
    """Keys (H, d) from features (n, H, d) and targets (n, H), zero outside the slow dimensions."""
    keys = torch.zeros(x.shape[1:])
    for head in range(len(keys)):
        keys[head, slow] = solve(x[:, head, slow], y[:, head])
    return keys


def _half_turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _mean_back(query: Tensor, cos: Tensor, sin: Tensor, sinks: Tensor) -> Tensor:
    """Rotated queries (B, H, N, d) turned back by the positions of the sinks (B, N) of their picture, averaged."""
    count = sinks.sum(1).clamp_min(1)[:, None, None, None]
    c, s = ((table * sinks[:, None, :, None]).sum(2, keepdim=True) / count for table in (cos, sin))
    return query * c - _half_turn(query) * s


def _fired(hidden: Tensor, visual: Tensor, model: Any) -> Tensor:
    """(B, N) bool: visual tokens whose largest hidden dimension dwarfs the rest."""
    strength = hidden.abs().amax(-1) / hidden.square().mean(-1).sqrt()
    return visual & (strength > 0.6 * (hidden.shape[-1] / 2) ** 0.5)


def _slow(model: Any, width: int) -> Tensor:
    """(d,) bool: dimensions whose rotary pair turns little over the visual tokens."""
    turn = model.model.language_model.rotary_emb.inv_freq * VISUAL_TOKENS
    assert len(turn) * 2 == width
    return (turn < SLOW_TURN).repeat(2)
