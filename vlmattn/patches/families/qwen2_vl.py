"""Qwen2-VL: native resolution, 2 x 2 patches merged into one token, a tower without windows or CLS token, M-RoPE."""

from __future__ import annotations

from vlmattn.patches.families import native
from vlmattn.patches.families.base import Family, register

register(
    Family(
        name="Qwen2-VL",
        model_type="qwen2_vl",
        model_class="Qwen2VLForConditionalGeneration",
        paper="2409.12191",
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
        tower_parts=native.tower_parts,
        position_state=("rope_deltas",),
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        vision_tower="model.visual",
        projector="model.visual.merger",
    )
)
