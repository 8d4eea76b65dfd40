"""Qwen2.5-VL: native resolution, 2 x 2 patches merged into one token, windowed vision attention without CLS, M-RoPE."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import CallError
from vlmattn.patches.families.base import Family, gray_values, register
from vlmattn.patches.tower import Rows, TowerParts
from vlmattn.spans import Geometry


def _grid(config: Any, tokens: int, rows: Tensor | None) -> tuple[int, int, int] | None:
    """Read the grid off the temporal, row and column positions `(3, tokens)` of an image."""
    if rows is None:
        return None
    height, width = (int(rows[axis].max() - rows[axis].min()) + 1 for axis in (1, 2))
    return (tokens // (height * width), height, width) if tokens % (height * width) == 0 else None


def _geometry(image_processor: Any, size: tuple[int, int], grid: tuple[int, int, int]) -> Geometry:
    return Geometry(grid=grid, size=size, origin=(0.0, 0.0), cell=(size[0] / grid[2], size[1] / grid[1]))


def _input_grids(config: Any, inputs: Mapping[str, Any]) -> Sequence[tuple[int, int, int]]:
    if inputs.get("image_grid_thw") is None:
        raise CallError("the inputs hold no image_grid_thw: give what the processor made of the images")
    merge = config.vision_config.spatial_merge_size
    return [(t, h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]


def _split(pixels: str, grids: str) -> Any:
    def split(arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        return arguments[pixels].split(arguments[grids].prod(-1).tolist())

    return split


def _tower_rows(attention: Any, arguments: Mapping[str, Any], tower: Mapping[str, Any], every: bool) -> Rows:
    """Every frame is a segment; rows stand in the order of windows, `merge ** 2` of them end in one token."""
    from transformers.vision_utils import get_vision_window_index

    config = attention.config
    hidden, bounds, grids = arguments["hidden_states"], arguments["cu_seqlens"], tower["grid_thw"]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    flat = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    query, key = rotate(flat[0], flat[1], *arguments["position_embeddings"])
    order, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
    group = config.spatial_merge_size**2
    token = order.to(hidden.device).repeat_interleave(group)
    lengths = (bounds[1:] - bounds[:-1]).to(hidden.device)
    column = torch.arange(int(lengths.max()), device=hidden.device)
    real = column < lengths[:, None]
    place = torch.where(real, bounds[:-1, None].to(hidden.device) + column, 0)
    return Rows(
        query=query[place].transpose(1, 2),
        key=key[place].transpose(1, 2),
        plain=flat[1][place].transpose(1, 2),
        scale=attention.scaling,
        token=token[place],
        real=real,
        lengths=tuple((grids.prod(-1) // group).tolist()),
    )


def _gray(arguments: Mapping[str, Any], group: int) -> Sequence[Tensor]:
    """Of every patch, frames together; the patches of a token stand side by side."""
    kind = "pixel_values" if "pixel_values" in arguments else "pixel_values_videos"
    grids = arguments["image_grid_thw" if kind == "pixel_values" else "video_grid_thw"]
    values = gray_values(arguments[kind].unflatten(-1, (3, -1)), channels=1)
    return values.unflatten(0, (-1, group)).split((grids.prod(-1) // group).tolist())


def _tower_parts(config: Any, tower: Any, projector: nn.Module) -> TowerParts:
    """The projector joins `merge ** 2` rows, so that what comes out of it counts as the features."""
    attentions = [block.attn for block in tower.blocks]
    return TowerParts(
        tower=tower,
        attentions=attentions,
        whole=sorted(tower.fullatt_block_indexes),
        feature_layer=len(attentions) - 1,
        rows=_tower_rows,
        projector=None,
        cls=None,
        gray=functools.partial(_gray, group=tower.spatial_merge_size**2),
        blocks=(),
    )


register(
    Family(
        name="Qwen2.5-VL",
        model_type="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        paper="2502.13923",
        has_cls=False,
        rope="mrope",
        grid_rule="t x h x w tokens an image or video, raster order of 2 x 2 merged patches",
        placeholder_ids=("image_token_id", "video_token_id"),
        tokens_per_image=lambda config: None,
        grid=_grid,
        geometry=_geometry,
        input_grids=_input_grids,
        feature_methods={
            "get_image_features": _split("pixel_values", "image_grid_thw"),
            "get_video_features": _split("pixel_values_videos", "video_grid_thw"),
        },
        tower_parts=_tower_parts,
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        vision_tower="model.visual",
        projector="model.visual.merger",
    )
)
