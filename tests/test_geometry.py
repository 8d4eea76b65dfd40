"""`Geometry` against the real image processors: light one token's rectangle, and that token's patches must light up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import vlmattn
from vlmattn.errors import CallError
from vlmattn.spans import Geometry

SIZES = [(90, 90), (200, 130), (131, 301), (97, 64)]


def lit(size: tuple[int, int], rect: tuple[float, float, float, float]) -> Image.Image:
    """A black image with one white rectangle."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x0, y0, x1, y1 = (round(v) for v in rect)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def clip_processor(**options: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        image_mean=[0, 0, 0], image_std=[1, 1, 1], crop_size={"height": 84, "width": 84}, **options
    )


def brightness(values: torch.Tensor, side: int) -> torch.Tensor:
    """Mean of every patch of `(1, 3, H, W)` pixels in raster order."""
    grid = values[0].mean(0).unfold(0, values.shape[2] // side, values.shape[2] // side)
    return grid.unfold(1, values.shape[3] // side, values.shape[3] // side).mean((-1, -2)).flatten()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 84}, "do_center_crop": True},
        {"size": {"height": 84, "width": 84}, "do_center_crop": False},
    ],
    ids=["crop", "stretch"],
)
def test_fixed_size_towers(size, options):
    model = tiny.llava()
    model.config.vision_config.image_size, model.config.vision_config.patch_size = 84, 14
    processor = clip_processor(**options)
    blank = Image.new("RGB", size)
    inputs = {"pixel_values": processor(images=[blank], return_tensors="pt")["pixel_values"]}
    with vlmattn.wrap(model, "none", SimpleNamespace(image_processor=processor)) as session:
        geometry = session.geometry([blank], inputs)[0]
    assert geometry.grid == (1, 6, 6)
    for index in (0, 7, 20, 35):
        values = processor(images=[lit(size, geometry.rect(index))], return_tensors="pt")["pixel_values"]
        light = brightness(values, 6)
        assert int(light.argmax()) == index
        others = torch.cat([light[:index], light[index + 1 :]])
        assert light[index] > 0.75 and others.max() < 0.35


def native_processor(patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = {"shortest_edge": 56 * 56, "longest_edge": 600 * 600}
    return Qwen2VLImageProcessorPil(size=limits, patch_size=patch, image_mean=[0, 0, 0], image_std=[1, 1, 1])


NATIVE = {"qwen2_5_vl": 14, "qwen2_vl": 14, "qwen3_vl": 16}
"""The families with one image processor, and the patches of each."""
native = pytest.mark.parametrize(("model_type", "patch"), NATIVE.items(), ids=list(NATIVE))


@native
@pytest.mark.parametrize("size", SIZES)
def test_native_resolution_towers(size, model_type, patch):
    processor = native_processor(patch)
    blank = Image.new("RGB", size)
    inputs = processor(images=[blank], return_tensors="pt")
    with vlmattn.wrap(tiny.MODELS[model_type](), "none", SimpleNamespace(image_processor=processor)) as session:
        geometry: Geometry = session.geometry([blank], inputs)[0]
        with pytest.raises(CallError, match="2 images were given, but the inputs hold 1"):
            session.geometry([blank, blank], inputs)
    _, height, width = inputs["image_grid_thw"][0].tolist()
    assert geometry.grid == (1, height // 2, width // 2)
    for index in (0, geometry.num_tokens // 2, geometry.num_tokens - 1):
        values = processor(images=[lit(size, geometry.rect(index))], return_tensors="pt")["pixel_values"]
        light = values.view(-1, 4, values.shape[1]).mean((1, 2))
        assert int(light.argmax()) == index
        others = torch.cat([light[:index], light[index + 1 :]])
        assert light[index] > 0.75 and others.max() < 0.35


@native
@pytest.mark.parametrize("size", SIZES)
def test_colours_tell_where_native_tokens_lie(size, model_type, patch):
    """Red grows to the right and green downwards, so that the mean colour of a token is the middle of its rectangle."""
    processor = native_processor(patch)
    x, y = ((np.arange(n) + 0.5) / n for n in size)
    colours = np.stack([*np.meshgrid(x, y), np.zeros(size[::-1])], -1)
    image = Image.fromarray((255 * colours).round().astype(np.uint8))
    inputs = processor(images=[image], return_tensors="pt")
    with vlmattn.wrap(tiny.MODELS[model_type](), "none", SimpleNamespace(image_processor=processor)) as session:
        geometry: Geometry = session.geometry([image], inputs)[0]
    tokens = inputs["pixel_values"].view(geometry.num_tokens, 4, 3, -1).mean((1, 3))
    for index, (red, green, _) in enumerate(tokens.tolist()):
        x0, y0, x1, y1 = geometry.rect(index)
        assert abs(red - (x0 + x1) / 2 / size[0]) < 0.02 and abs(green - (y0 + y1) / 2 / size[1]) < 0.02
        assert geometry.index(red * size[0], green * size[1]) == index


def test_the_grid_is_known_inside_the_model():
    """Two-dimensional picks need the grid; the M-RoPE family reads it off the positions, image by image."""
    wide = [(1, 4, 4), (1, 4, 6)]
    for family, grids in (("llava", [(1, 4, 4), (1, 4, 4)]), *((name, wide) for name in NATIVE)):
        model, seen = tiny.MODELS[family](), []
        with torch.no_grad(), vlmattn.wrap(model, "uniform(keep=4, before_layer=0, mode='2d')") as session:
            model(**tiny.prompts(family))
            seen = [row[0].grid for row in session._engine.last.spans]
            assert [len(row[0]) for row in session.report().stages[0].kept] == [4, 4]
        assert seen == grids
