"""Maps of layers and heads: one panel a statistic, a row a decoder layer, a column a query head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = ("visual_mass", "sink_mass", "max")
TITLES = {
    "visual_mass": "attention on the image",
    "sink_mass": "attention on sinks",
    "entropy": "entropy, nats",
    "max": "largest weight",
    "divergence": "divergence without the image (VHD)",
}


def draw(maps: Mapping[str, NDArray[np.float32]], title: str = "") -> Figure:
    """A figure with a panel for every map.

    Args:
        maps: `(layers, heads)` each, by the name of the statistic; NaN is left white. Shares of attention are shown
            from 0 to 1 by one scale, others from 0 to their largest value.
        title: above all panels.

    Raises:
        ValueError: there is no map, or one has another shape.
    """
    from matplotlib.figure import Figure

    shapes = {values.shape for values in maps.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"maps of shapes {sorted(shapes)}: give at least one, each (layers, heads)")
    layers, heads = next(iter(shapes))
    columns = min(len(maps), 3)
    lines = math.ceil(len(maps) / columns)
    width, height = min(max(0.16 * heads, 2.4), 7.0), min(max(0.16 * layers, 2.0), 9.0)
    figure = Figure(figsize=(columns * (width + 1.1), lines * (height + 0.8) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(lines, columns, squeeze=False)
    for place, (name, values) in zip(grid.flat, maps.items(), strict=False):
        _panel(figure, place, name, values)
    for place in grid.flat[len(maps) :]:
        place.set_visible(False)
    return figure


def _panel(figure: Figure, place: Axes, name: str, values: NDArray[np.float32]) -> None:
    from matplotlib.ticker import MaxNLocator

    largest = 1.0 if name in SHARES else float(np.nanmax(values, initial=0.0)) or 1.0
    shown = place.imshow(values, vmin=0.0, vmax=largest, cmap="viridis", aspect="auto", interpolation="nearest")
    place.set_title(TITLES.get(name, name), fontsize=9)
    place.set_xlabel("head", fontsize=8)
    place.set_ylabel("layer", fontsize=8)
    place.tick_params(labelsize=7)
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=place).ax.tick_params(labelsize=7)


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure (PNG unless the name says otherwise), making the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format=None if path.suffix else "png")
    return path
