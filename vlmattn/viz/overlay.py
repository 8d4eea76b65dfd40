"""Kept tokens bright, dropped ones dim: one panel per pruning stage, beside the original image."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vlmattn.report import Report
    from vlmattn.spans import Geometry

UNSEEN, DROPPED, KEPT = 0, 1, 2
_SIDE = 300
_GAP = 10
_LINE = 17
_BACKGROUND, _INK, _EDGE = (255, 255, 255), (30, 30, 30), (255, 176, 0)
Panel = tuple[str, Image.Image]
Pruned = tuple[str, int, Collection[int]]


def token_mask(geometry: Geometry, kept: Collection[int], scale: float = 1.0) -> NDArray[np.uint8]:
    """Which pixels belong to kept and to dropped visual tokens.

    Args:
        geometry: where the tokens of the image are.
        kept: indices of the visual tokens that stayed, raster order.
        scale: pixels of the mask per pixel of the original image.

    Returns:
        (height, width) of `KEPT`, `DROPPED` or `UNSEEN`; unseen pixels belong to no token (cut off by the processor).
    """
    width, height = (max(1, round(side * scale)) for side in geometry.size)
    mask = np.full((height, width), UNSEEN, dtype=np.uint8)
    total = geometry.num_tokens
    chosen = set(kept)
    if chosen and not 0 <= min(chosen) <= max(chosen) < total:
        raise ValueError(
            f"kept tokens {min(chosen)}..{max(chosen)} do not fit the grid {geometry.grid} of {total} tokens"
        )
    for index in sorted(range(total), key=lambda token: token in chosen):
        x0, y0, x1, y1 = (round(edge * scale) for edge in geometry.rect(index))
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = KEPT if index in chosen else DROPPED
    return mask


def shade(image: Image.Image, geometry: Geometry, kept: Collection[int], side: int = _SIDE) -> Image.Image:
    """The image at a longest side of `side` pixels: kept tokens as they are and outlined, dropped ones dim and grey."""
    picture, scale = _scaled(image, side)
    mask = token_mask(geometry, kept, scale)
    mask = mask[: picture.height, : picture.width]
    pixels = np.asarray(picture, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    dim = 0.22 * grey + 34
    result = np.where(mask[..., None] == KEPT, pixels, dim)
    rows, columns = np.indices(mask.shape)
    result = np.where(((mask == UNSEEN) & ((rows + columns) % 8 < 2))[..., None], 12.0, result)
    result = np.where(_outline(mask == KEPT)[..., None], np.array(_EDGE, dtype=np.float32), result)
    return Image.fromarray(result.clip(0, 255).astype(np.uint8))


def panels(
    image: Image.Image, geometry: Geometry, report: Report, sample: int = 0, number: int = 0, side: int = _SIDE
) -> list[Panel]:
    """(title, picture) of the original and of every pruning stage.

    Args:
        image: the original image.
        geometry: its tokens.
        report: of the run that saw it.
        sample: row of the batch.
        number: which image of the prompt.
        side: longest side of a picture in pixels.
    """
    pruned = [(stage.method, stage.before_layer, stage.kept[sample][number]) for stage in report.stages]
    return stage_panels(image, geometry, pruned, side)


def stage_panels(image: Image.Image, geometry: Geometry, pruned: Sequence[Pruned], side: int = _SIDE) -> list[Panel]:
    """(title, picture) of the original and of every stage in `pruned`: what `panels` does without a report.

    Args:
        image: the original image.
        geometry: its tokens.
        pruned: (method, decoder layer before which it acts, indices of the visual tokens it left), in order of layer.
        side: longest side of a picture in pixels.
    """
    total = geometry.num_tokens
    found = [(f"what the model is given\n{total} visual tokens", fit(image, side))]
    for method, before_layer, kept in pruned:
        where = "before the first layer" if before_layer <= 0 else f"before layer {before_layer}"
        found.append((f"{method}\n{where}: {len(kept)} of {total} kept", shade(image, geometry, kept, side)))
    return found


def fit(image: Image.Image, side: int = _SIDE) -> Image.Image:
    """The image in RGB at a longest side of `side` pixels."""
    return _scaled(image, side)[0]


def draw(
    images: Sequence[Image.Image], geometries: Sequence[Geometry], report: Report, sample: int = 0, side: int = _SIDE
) -> Image.Image:
    """One picture: a row per image of the prompt, a column per pruning stage after the original."""
    if len(images) != len(geometries):
        raise ValueError(f"{len(images)} images but {len(geometries)} geometries: give one geometry per image")
    return sheet(
        [
            panels(image, geometry, report, sample, number, side)
            for number, (image, geometry) in enumerate(zip(images, geometries, strict=True))
        ]
    )


def sheet(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Panels on white paper, row by row, each under its title (lines split at newlines)."""
    font = ImageFont.load_default(size=13)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    columns = max(len(row) for row in rows)
    lines = max(title.count("\n") + 1 for row in rows for title, _ in row)
    titles = [max(pen.textlength(line, font=font) for line in title.split("\n")) for row in rows for title, _ in row]
    cell = math.ceil(max(max(picture.width for row in rows for _, picture in row), *titles)) + _GAP
    head = lines * _LINE + 6
    heights = [head + max(picture.height for _, picture in row) + _GAP for row in rows]
    paper = Image.new("RGB", (columns * cell + _GAP, sum(heights) + _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(paper)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            x = _GAP + column * cell
            for number, line in enumerate(title.split("\n")):
                pen.text((x, y + number * _LINE), line, fill=_INK, font=font)
            paper.paste(picture, (x, y + head))
        y += height
    return paper


def save(picture: Image.Image, path: str | Path) -> Path:
    """Write the picture (PNG unless the name says otherwise), making the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format=None if path.suffix else "PNG")
    return path


def _scaled(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, kind), scale


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a region with a neighbour outside it; what is beyond the picture counts as inside."""
    padded = np.pad(inside, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~neighbours
