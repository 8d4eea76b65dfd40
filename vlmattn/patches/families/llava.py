"""LLaVA-1.5: a CLIP tower at one fixed size, every patch one token, a two-layer projector, a Llama-like decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import CallError
from vlmattn.patches.families.base import PIXEL_MEAN, PIXEL_STD, Family, Visible, gray_values, register
from vlmattn.patches.tower import Normal, Rows, TowerParts
from vlmattn.spans import Geometry


def _side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _tokens_per_image(config: Any) -> int:
    cls = 1 if config.vision_feature_select_strategy == "full" else 0
    return _side(config) ** 2 + cls


def _grid(config: Any, tokens: int, rows: Tensor | None) -> tuple[int, int, int] | None:
    side = math.isqrt(tokens)
    return (1, side, side) if side * side == tokens else None


def _geometry(image_processor: Any, size: tuple[int, int], grid: tuple[int, int, int]) -> Geometry:
    """Follow the processor: pad to a square, resize, centre crop, each only if its config says so."""
    width, height = size
    left, top, scale_x, scale_y = 0.0, 0.0, 1.0, 1.0
    seen: tuple[float, float] = (width, height)
    if getattr(image_processor, "do_pad", False):
        side = max(width, height)
        left, top, seen = (side - width) // 2, (side - height) // 2, (side, side)
    target = dict(image_processor.size)
    if target.get("shortest_edge"):
        short, long = min(seen), max(seen)
        edges = {short: target["shortest_edge"], long: int(target["shortest_edge"] * long / short)}
        if short == long:
            edges = {short: target["shortest_edge"]}
        resized = (edges[seen[0]], edges[seen[1]])
    else:
        resized = (target["width"], target["height"])
    scale_x, scale_y = resized[0] / seen[0], resized[1] / seen[1]
    crop_x, crop_y, view = 0.0, 0.0, resized
    if getattr(image_processor, "do_center_crop", False):
        crop = dict(image_processor.crop_size)
        view = (crop["width"], crop["height"])
        crop_x, crop_y = (resized[0] - view[0]) // 2, (resized[1] - view[1]) // 2
    _, rows, columns = grid
    return Geometry(
        grid=grid,
        size=size,
        origin=(crop_x / scale_x - left, crop_y / scale_y - top),
        cell=(view[0] / columns / scale_x, view[1] / rows / scale_y),
    )


def _input_grids(config: Any, inputs: Mapping[str, Any]) -> Sequence[tuple[int, int, int]]:
    if config.vision_feature_select_strategy == "full":
        raise CallError(
            "with vision_feature_select_strategy='full' the first visual token is no patch: no map to pixels"
        )
    if "pixel_values" not in inputs:
        raise CallError("the inputs hold no pixel_values: give what the processor made of the images")
    return [(1, _side(config), _side(config))] * len(inputs["pixel_values"])


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def tower_rows(
    attention: Any, arguments: Mapping[str, Any], tower: Mapping[str, Any], every: bool, with_cls: bool
) -> Rows:
    """Every image is a segment, its first row CLS; `with_cls`: CLS is a visual token like the others."""
    hidden: Tensor = arguments["hidden_states"]
    images, length, _ = hidden.shape
    key = _heads(attention.k_proj(hidden), attention)
    tokens = length if with_cls else length - 1
    place = torch.arange(length, device=hidden.device) + (tokens - length)
    token = torch.arange(images, device=hidden.device)[:, None] * tokens + place
    return Rows(
        query=_heads(attention.q_proj(hidden if every else hidden[:, :1]), attention),
        key=key,
        plain=key,
        scale=attention.scale,
        token=torch.where(place < 0, -1, token),
        real=torch.ones_like(token, dtype=torch.bool),
        lengths=(tokens,) * images,
    )


def gray_patches(arguments: Mapping[str, Any], normal: Normal | None, patch: int, with_cls: bool) -> Sequence[Tensor]:
    """Of every patch of an image in raster order; a CLS token has one value, that of black."""
    values = gray_values(arguments["pixel_values"], 1, *(normal or (PIXEL_MEAN, PIXEL_STD)))
    patches = values.unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2).flatten(2)[:, :, None]
    return list(torch.nn.functional.pad(patches, (0, 0, 0, 0, int(with_cls), 0)))


def _blacken(config: Any, values: Tensor, grid: tuple[int, int, int], visible: Visible, black: Tensor) -> Tensor:
    """Of pixels `(3, H, W)`."""
    return torch.where(visible(*values.shape[-2:]), values, black[:, None, None])


def tower_parts(config: Any, tower: Any, projector: nn.Module) -> TowerParts:
    """Of a tower of plain layers, whose pictures all have the same size."""
    attentions = [layer.self_attn for layer in tower.encoder.layers]
    chosen = config.vision_feature_layer
    with_cls = config.vision_feature_select_strategy == "full"
    states = [chosen] if isinstance(chosen, int) else list(chosen)  # states: the embeddings, then one a layer
    return TowerParts(
        tower=tower,
        attentions=attentions,
        whole=range(len(attentions)),
        feature_layer=max(max(state % (len(attentions) + 1) for state in states) - 1, 0),
        rows=functools.partial(tower_rows, with_cls=with_cls),
        projector=projector,
        cls=lambda output: torch.cat([output.hidden_states[state][:, :1] for state in states], -1),
        gray=functools.partial(gray_patches, patch=config.vision_config.patch_size, with_cls=with_cls),
        blocks=list(tower.encoder.layers),
    )


register(
    Family(
        name="LLaVA-1.5",
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        paper="2310.03744",
        has_cls=True,
        rope="1d",
        grid_rule="one square grid an image, raster order, no newline tokens",
        placeholder_ids=("image_token_id",),
        tokens_per_image=_tokens_per_image,
        grid=_grid,
        geometry=_geometry,
        input_grids=_input_grids,
        feature_methods={"get_image_features": lambda arguments: list(arguments["pixel_values"])},
        blacken=_blacken,
        tower_parts=tower_parts,
    )
)
