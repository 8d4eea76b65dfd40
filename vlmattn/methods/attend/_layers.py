"""What editors of a range of layers share: two fields, their checks and the paper's range at other depths."""

from __future__ import annotations

import math

from vlmattn.errors import LayerError
from vlmattn.methods.base import Editor
from vlmattn.methods.checks import Checks


class LayerRange(Checks, Editor):
    """Edits the layers from `first_layer` to `last_layer`.

    A subclass is a frozen dataclass with these two fields, each an int or None.
    """

    first_layer: int | None
    last_layer: int | None

    def __post_init__(self) -> None:
        """Validate the layers.

        Raises:
            LayerError: one is no layer.
        """
        for name in ("first_layer", "last_layer"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise LayerError(f"{self.name}.{name}={value!r} is not a layer: give an int, counting from 0, or None")

    def paper_layers(self, num_layers: int) -> tuple[int, int]:
        """The first and the last layer where the fields are None."""
        return 0, num_layers - 1

    def layers(self, num_layers: int) -> range:
        """First to last edited layer.

        Raises:
            LayerError: they are not a range in this model.
        """
        first, last = self.paper_layers(num_layers)
        first = first if self.first_layer is None else self.first_layer
        last = last if self.last_layer is None else self.last_layer
        if not 0 <= first <= last < num_layers:
            raise LayerError(
                f"{self}: layers {first} to {last} are not a range in a model of {num_layers} decoder layers"
            )
        return range(first, last + 1)


def scaled(share: float, num_layers: int) -> int:
    """The layer at a share of the depth, to the nearest."""
    return math.floor(share * num_layers + 0.5)
