"""Where kept tokens are in the height of the image, as SVG: a line of bands a method."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from vlmattn.eval.plots import bare
from vlmattn.eval.summary import Row

MOST = 3.0
"""Where the colours end: so many times as many tokens as an even choice would have in a band."""


def kept_bands(rows: Sequence[Row]) -> str:
    """Rows whose `kept_bands` are known, one line of bands each, top of the image on the left; an `<svg>` element.

    White is as many tokens as an even choice has, red more, blue fewer; the mark stands at the mean row, the dashed
    line at the middle of the image.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    shown = [row for row in rows if "kept_bands" in row.cost]
    density = np.array([row.cost["kept_bands"] for row in shown])
    density = density * density.shape[1]
    whole = Figure(figsize=(9.0, 1.3 + 0.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(whole)
    axes = whole.subplots()
    edges = np.linspace(0, 1, density.shape[1] + 1)
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(shown) + 1),
        np.clip(density, 0, MOST),
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1.0, 0.0, MOST),
        edgecolors="white",
        linewidth=0.3,
    )
    axes.plot([row.cost["kept_row"] for row in shown], np.arange(len(shown)) + 0.5, "|", color="black", markersize=9)
    axes.axvline(0.5, color="#8a8a8a", linestyle="--", linewidth=0.8)
    axes.set_yticks(np.arange(len(shown)) + 0.5, [row.label for row in shown], fontsize=7.5)
    axes.set_ylim(len(shown), 0)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["top", "middle", "bottom"])
    axes.set_xlabel("height in the image; mark: mean row of the kept tokens")
    shrink = min(1.0, 0.2 + 8 / (len(shown) + 8))
    scale = whole.colorbar(mesh, ax=axes, label="kept tokens, times an even choice", shrink=shrink)
    assert scale.solids is not None
    scale.solids.set_rasterized(False)  # a picture inside the page would be blurred, and need another policy
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "vlmattn"}):
        whole.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return bare(file.getvalue())
