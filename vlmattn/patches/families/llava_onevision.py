"""LLaVA-OneVision: a SigLIP tower without CLS; one image in tiles, several images whole, videos in pooled frames."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlmattn.errors import CallError
from vlmattn.patches import anyres
from vlmattn.patches.families.base import Family, register
from vlmattn.patches.families.llava import gray_patches, tower_parts, tower_rows
from vlmattn.patches.tower import Normal, TowerParts
from vlmattn.spans import Geometry, Raster


def _pictures(config: Any, arguments: Mapping[str, Any]) -> Sequence[anyres.Picture]:
    """An image is cut into tiles where it is the only one of its sample."""
    sizes = arguments.get("image_sizes")
    if sizes is None:
        raise CallError("the inputs hold no image_sizes: give what the processor made of the images")
    counts = arguments.get("batch_num_images")
    together = [1] * len(sizes) if counts is None else [int(n) for n in counts for _ in range(int(n))]
    most = int((arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    return [
        anyres.picture(config, size, most) if alone == 1 else anyres.whole(config)
        for size, alone in zip(sizes.tolist(), together, strict=True)
    ]


def _geometry(image_processor: Any, size: tuple[int, int], picture: anyres.Picture) -> Geometry:
    return picture.geometry(size) if picture.mosaic else picture.padded_geometry(size)


def _image_layout(config: Any, arguments: Mapping[str, Any]) -> Sequence[tuple[Raster, ...]]:
    return [picture.rasters for picture in _pictures(config, arguments)]


def _video_layout(config: Any, arguments: Mapping[str, Any]) -> Sequence[tuple[Raster, ...]]:
    """All frames, and one newline token."""
    videos, frames = arguments["pixel_values_videos"].shape[:2]
    side = math.ceil(anyres.whole(config).cells / 2)
    return [(Raster((frames, side, side), line=frames * side * side),)] * videos


def _arrange(crops: Tensor, arguments: Mapping[str, Any], config: Any) -> list[Tensor]:
    if "pixel_values_videos" in arguments:
        return anyres.pooled(crops, len(arguments["pixel_values_videos"]))
    return anyres.arranged(_pictures(config, arguments), crops)


def _gray(arguments: Mapping[str, Any], normal: Normal | None, config: Any) -> Sequence[Tensor]:
    if "pixel_values_videos" in arguments:
        crops = arguments["pixel_values_videos"].flatten(0, 1)
    else:
        crops = anyres.real_crops(_pictures(config, arguments), arguments["pixel_values"])
    return gray_patches({"pixel_values": crops}, normal, config.vision_config.patch_size, with_cls=False)


def _tower_parts(config: Any, tower: Any, projector: nn.Module) -> TowerParts:
    """Tokens may be means of several tower rows, so that what comes out of the projector counts as the features."""
    parts = tower_parts(config, tower, projector)
    return dataclasses.replace(
        parts,
        rows=functools.partial(tower_rows, with_cls=True),  # every row is a patch
        projector=None,
        cls=None,
        gray=functools.partial(_gray, config=config),
        blocks=(),
        arrange=functools.partial(_arrange, config=config),
    )


register(
    Family(
        name="LLaVA-OneVision",
        model_type="llava_onevision",
        model_class="LlavaOnevisionForConditionalGeneration",
        paper="2408.03326",
        has_cls=False,
        rope="1d",
        grid_rule="as LLaVA-NeXT where a sample has one image, else one grid an image or video and a newline token",
        placeholder_ids=("image_token_id", "video_token_id"),
        tokens_per_image=lambda config: None,
        grid=lambda config, tokens, rows: None,
        geometry=_geometry,
        input_grids=_pictures,
        feature_methods={
            "get_image_features": lambda arguments: anyres.filled(arguments["pixel_values"]),
            "get_video_features": lambda arguments: list(arguments["pixel_values_videos"]),
        },
        layouts={"get_image_features": _image_layout, "get_video_features": _video_layout},
        tower_parts=_tower_parts,
    )
)
