"""Qwen2.5-VL: native resolution, 2 x 2 patches merged into one token, windowed vision attention without CLS, M-RoPE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmattn.patches.families import native
from vlmattn.patches.families.base import Family, register
from vlmattn.patches.tower import TowerParts


def _window_order(config: Any, grids: Tensor) -> Tensor:
    """The tower's rows stand window by window."""
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)[0]


def _tower_parts(config: Any, tower: Any, projector: Any) -> TowerParts:
    whole = sorted(tower.fullatt_block_indexes)
    return native.tower_parts(config, tower, projector, whole=whole, order=_window_order)


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
        grid=native.grid,
        geometry=native.geometry,
        input_grids=native.input_grids,
        token_side=native.token_side,
        feature_methods=native.feature_methods(),
        blacken=native.blacken,
        tower_parts=_tower_parts,
        position_state=("rope_deltas",),
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        vision_tower="model.visual",
        projector="model.visual.merger",
    )
)
