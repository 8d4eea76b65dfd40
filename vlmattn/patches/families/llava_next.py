"""LLaVA-NeXT: a CLIP tower that sees the whole image and a mosaic of tiles, whose rows end in newline tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vlmattn.errors import CallError
from vlmattn.patches import anyres
from vlmattn.patches.families.base import Family, register
from vlmattn.patches.families.llava import tower_parts
from vlmattn.patches.tower import TowerParts
from vlmattn.spans import Raster


def _pictures(config: Any, arguments: Mapping[str, Any]) -> Sequence[anyres.Picture]:
    sizes = arguments.get("image_sizes")
    if sizes is None:
        raise CallError("the inputs hold no image_sizes: give what the processor made of the images")
    return [anyres.picture(config, size) for size in sizes.tolist()]


def _layout(config: Any, arguments: Mapping[str, Any]) -> Sequence[tuple[Raster, ...]]:
    return [picture.rasters for picture in _pictures(config, arguments)]


def _tower_parts(config: Any, tower: Any, projector: nn.Module) -> TowerParts:
    """That of a tower with one image, for every crop."""
    parts = tower_parts(config, tower, projector)
    return dataclasses.replace(
        parts,
        gray=lambda arguments, normal: parts.gray(
            {"pixel_values": anyres.real_crops(_pictures(config, arguments), arguments["pixel_values"])}, normal
        ),
        arrange=lambda crops, arguments: anyres.arranged(_pictures(config, arguments), crops),
    )


register(
    Family(
        name="LLaVA-NeXT",
        model_type="llava_next",
        model_class="LlavaNextForConditionalGeneration",
        paper="2310.03744",
        has_cls=True,
        rope="1d",
        grid_rule="the whole image as a square grid, then a mosaic of tiles without padding, a newline token a row",
        placeholder_ids=("image_token_id",),
        tokens_per_image=lambda config: None,
        grid=lambda config, tokens, rows: None,
        geometry=lambda processor, size, picture: picture.geometry(size),
        input_grids=_pictures,
        feature_methods={"get_image_features": lambda arguments: anyres.filled(arguments["pixel_values"])},
        layouts={"get_image_features": _layout},
        tower_parts=_tower_parts,
    )
)
