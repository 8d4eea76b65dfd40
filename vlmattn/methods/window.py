"""Windows of decoder layers, given by numbers or by shares of the depth."""

from __future__ import annotations

import math

from vlmattn.errors import LayerError

Window = tuple[int | float, int | float]
"""First layer and the one behind the last, each an int, or a float in [0, 1] that is a share of the depth."""


def check_window(window: object, where: str) -> Window:
    """The window as a tuple, if it is one.

    Raises:
        LayerError: it is not two bounds in order.
    """
    said = f"{where}={window!r}: expected two bounds such as (8, 16), or shares of the depth such as (0.25, 0.5)"
    if not isinstance(window, list | tuple) or len(window) != 2:
        raise LayerError(said)
    first, stop = window
    for bound in (first, stop):
        fits = not isinstance(bound, bool) and isinstance(bound, int | float) and bound >= 0
        if not fits or (isinstance(bound, float) and bound > 1):
            raise LayerError(said)
    if type(first) is type(stop) and first > stop:
        raise LayerError(f"{where}={window!r} ends before it begins: the first bound is the lower one")
    return first, stop


def window_layers(window: Window, num_layers: int, method: str) -> range:
    """The decoder layers of a window in a model of `num_layers` layers: `floor(first * L)` to `ceil(stop * L) - 1`.

    Raises:
        LayerError: the model has no such layers.
    """
    first, stop = window
    if first == stop:
        return range(0)
    # shares such as 0.1 are not exact
    start = math.floor(round(first * num_layers, 9)) if isinstance(first, float) else int(first)
    end = math.ceil(round(stop * num_layers, 9)) if isinstance(stop, float) else int(stop)
    if not start < end <= num_layers:
        raise LayerError(
            f"{method}: layers {start} to {end - 1} are not a window in a model of {num_layers} decoder layers"
        )
    return range(start, end)
