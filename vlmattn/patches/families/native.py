"""What families with towers at native resolution share: patches merged into tokens, one packed sequence, M-RoPE."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.patches.families.base import PIXEL_MEAN, PIXEL_STD, Visible, gray_values
from vlmattn.patches.tower import Normal, Rows, TowerParts
from vlmattn.spans import Geometry

ORDER = Callable[[Any, Tensor], Tensor]
"""The tower's config and grids `(n, 3)` in patches to the tokens `(tokens,)` long in the order of the tower's rows."""


def grid(config: Any, tokens: int, rows: Tensor | None) -> tuple[int, int, int] | None:
    """Read the grid off the temporal, row and column positions `(3, tokens)` of an image."""
    if rows is None:
        return None
    height, width = (int(rows[axis].max() - rows[axis].min()) + 1 for axis in (1, 2))
    return (tokens // (height * width), height, width) if tokens % (height * width) == 0 else None


def geometry(image_processor: Any, size: tuple[int, int], grid: tuple[int, int, int]) -> Geometry:
    """The whole image, stretched to a multiple of the token's side."""
    return Geometry(grid=grid, size=size, origin=(0.0, 0.0), cell=(size[0] / grid[2], size[1] / grid[1]))


def input_grids(config: Any, inputs: Mapping[str, Any]) -> Sequence[tuple[int, int, int]]:
    """Of all images, in tokens.

    Raises:
        CallError: the inputs hold no grids.
    """
    if inputs.get("image_grid_thw") is None:
        raise CallError("the inputs hold no image_grid_thw: give what the processor made of the images")
    merge = config.vision_config.spatial_merge_size
    return [(t, h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]


def token_side(image_processor: Any) -> int:
    """Pixels along a side of a visual token."""
    return int(image_processor.patch_size * image_processor.merge_size)


def feature_methods(frames: bool = False) -> dict[str, Callable[[Mapping[str, Any]], Sequence[Tensor]]]:
    """Of images and of videos; with `frames` every frame of a video (a temporal patch) counts as an image."""

    def split(pixels: str, grids: str) -> Callable[[Mapping[str, Any]], Sequence[Tensor]]:
        return lambda arguments: arguments[pixels].split(_sizes(arguments[grids], frames))

    return {
        "get_image_features": split("pixel_values", "image_grid_thw"),
        "get_video_features": split("pixel_values_videos", "video_grid_thw"),
    }


def blacken(config: Any, values: Tensor, grid: tuple[int, int, int], visible: Visible, black: Tensor) -> Tensor:
    """Of patches, `merge ** 2` side by side for each token, each with its channels, frames, rows and columns."""
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    frames, height, width = grid
    seen = visible(height * merge * patch, width * merge * patch)
    seen = seen.view(height, merge, patch, width, merge, patch).permute(0, 3, 1, 4, 2, 5)
    split = values.view(frames, height, width, merge, merge, 3, -1, patch, patch)
    return torch.where(seen[:, :, :, :, None, None], split, black.view(3, 1, 1, 1)).reshape(values.shape)


def tower_parts(
    config: Any,
    tower: Any,
    projector: Any,
    whole: Sequence[int] | None = None,
    order: ORDER | None = None,
    frames: bool = False,
    pixels: Normal = (PIXEL_MEAN, PIXEL_STD),
) -> TowerParts:
    """The projector joins `merge ** 2` rows, so that what comes out of it counts as the features.

    Args:
        config, tower, projector: as `Family.tower_parts` gets them.
        whole: the layers that see a whole frame at once; None: all.
        order: of the tower's rows where they do not stand in the prompt's.
        frames: as for `feature_methods`.
        pixels: mean and standard deviation that the released processors normalise by, where none is known.
    """
    attentions, group = [block.attn for block in tower.blocks], tower.spatial_merge_size**2
    return TowerParts(
        tower=tower,
        attentions=attentions,
        whole=range(len(attentions)) if whole is None else whole,
        feature_layer=len(attentions) - 1,
        rows=functools.partial(_tower_rows, order=order, frames=frames),
        projector=None,
        cls=None,
        gray=functools.partial(_gray, group=group, frames=frames, pixels=pixels),
        blocks=(),
        images=functools.partial(_images, group=group, frames=frames),
    )


def _sizes(grids: Tensor, frames: bool, group: int = 1) -> list[int]:
    """How many groups of patches every image or video has, or with `frames` every frame of them."""
    plane = grids[:, 1:].prod(-1) // group
    return (plane.repeat_interleave(grids[:, 0]) if frames else plane * grids[:, 0]).tolist()


def _grids(arguments: Mapping[str, Any]) -> Tensor:
    """Of what a feature method was called with."""
    return arguments["image_grid_thw" if "pixel_values" in arguments else "video_grid_thw"]


def _tower_rows(
    attention: Any,
    arguments: Mapping[str, Any],
    tower: Mapping[str, Any],
    every: bool,
    order: ORDER | None,
    frames: bool,
) -> Rows:
    """Every frame is a segment; `merge ** 2` rows that stand side by side end in one token."""
    config = attention.config
    hidden, bounds, grids = arguments["hidden_states"], arguments["cu_seqlens"], tower["grid_thw"]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    flat = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    query, key = rotate(flat[0], flat[1], *arguments["position_embeddings"])
    group = config.spatial_merge_size**2
    tokens = torch.arange(len(hidden) // group) if order is None else order(config, grids)
    token = tokens.to(hidden.device).repeat_interleave(group)
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
        lengths=tuple(_sizes(grids, frames, group)),
    )


def _gray(
    arguments: Mapping[str, Any], normal: Normal | None, group: int, frames: bool, pixels: Normal
) -> Sequence[Tensor]:
    """Of every patch, the two frames of a temporal patch together; the patches of a token stand side by side."""
    values = arguments["pixel_values" if "pixel_values" in arguments else "pixel_values_videos"]
    values = gray_values(values.unflatten(-1, (3, -1)), 1, *(normal or pixels))
    return values.unflatten(0, (-1, group)).split(_sizes(_grids(arguments), frames, group))


def _images(output: Any, arguments: Mapping[str, Any], group: int, frames: bool) -> Sequence[Tensor]:
    return torch.cat(list(output.pooler_output)).split(_sizes(_grids(arguments), frames, group))
