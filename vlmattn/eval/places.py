"""How high in the image the visual tokens stand that a method keeps, from the records of a run.

A method that goes by attention may keep the bottom of every image (FEATHER, arXiv 2412.13180): then the mean row of
what it keeps lies below the middle of the grid. Even or blind choices have 0.5.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BANDS = 8
"""Bands of equal height, from top to bottom, in which kept tokens are counted."""


def kept_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the kept tokens stand, mean over the questions for which some were dropped and some are left.

    Args:
        records: of a run; their `kept` and `geometry` are read.

    Returns:
        `kept_row`: mean of (row + 0.5) / height over the tokens that the last stage left; `kept_bands`: their share in
        each of `BANDS` bands, a row that two bands share counting for both. Empty where nothing was dropped.
    """
    found = []
    for record in records:
        stages, geometry = record.get("kept"), record.get("geometry")
        if stages and geometry:
            grids = tuple(tuple(part["grid"]) for part in (geometry, *geometry.get("more", ())))
            place = _place(stages[-1]["mask"], grids)
            found += [] if place is None else [place]
    if not found:
        return {}
    means, bands = zip(*found, strict=True)
    return {"kept_row": float(np.mean(means)), "kept_bands": np.mean(bands, axis=0).tolist()}


@functools.lru_cache(maxsize=4096)
def _place(mask: str, grids: tuple[tuple[int, int, int], ...]) -> tuple[float, NDArray[np.float64]] | None:
    """Mean row and shares of the bands of one packed mask over the grids of an image; None where no token is left."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(mask), np.uint8), bitorder="little").astype(np.float64)
    rows, bands, start = 0.0, np.zeros(BANDS), 0
    for frames, height, width in grids:
        end = start + frames * height * width
        counts = bits[start:end].reshape(frames, height, width).sum(axis=(0, 2))
        edges, bounds = np.arange(height + 1) / height, np.arange(BANDS + 1) / BANDS
        low, high = np.maximum(edges[:-1, None], bounds[None, :-1]), np.minimum(edges[1:, None], bounds[None, 1:])
        rows += float(counts @ ((np.arange(height) + 0.5) / height))
        bands += counts @ (np.clip(high - low, 0, None) * height)
        start = end
    total = bits[:start].sum()
    return (rows / total, bands / total) if total else None
