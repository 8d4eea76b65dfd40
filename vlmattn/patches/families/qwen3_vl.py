"""Qwen3-VL: native resolution, 2 x 2 patches merged into one token, no CLS, interleaved M-RoPE, DeepStack.

The frames of a video stand in the prompt one by one, each between wrapper tokens and behind a timestamp in words. So a
frame (of two pictures, a temporal patch) counts as an image, with a budget of its own, and timestamps count as text.
"""

from __future__ import annotations

import functools

from vlmattn.patches.families import native
from vlmattn.patches.families.base import Family, register

HALF = (0.5, 0.5, 0.5)

register(
    Family(
        name="Qwen3-VL",
        model_type="qwen3_vl",
        model_class="Qwen3VLForConditionalGeneration",
        paper="2511.21631",
        has_cls=False,
        rope="mrope",
        grid_rule="h x w tokens an image or video frame, raster order of 2 x 2 merged patches; DeepStack",
        placeholder_ids=("image_token_id", "video_token_id"),
        tokens_per_image=lambda config: None,
        grid=native.grid,
        geometry=native.geometry,
        input_grids=native.input_grids,
        token_side=native.token_side,
        feature_methods=native.feature_methods(frames=True),
        blacken=native.blacken,
        tower_parts=functools.partial(native.tower_parts, frames=True, pixels=(HALF, HALF)),
        query=("self_attn.q_proj", "self_attn.q_norm"),
        key=("self_attn.k_proj", "self_attn.k_norm"),
        position_state=("rope_deltas",),
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        vision_tower="model.visual",
        projector="model.visual.merger",
        deepstack="deepstack_visual_embeds",
    )
)
