"""Qwen2.5-VL: native resolution, 2 x 2 patches merged into one token, windowed vision attention without CLS, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.patches.families.base import Family, register
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
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        vision_tower="model.visual",
        projector="model.visual.merger",
    )
)
