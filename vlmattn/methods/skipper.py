"""What a method that leaves out decoder layers implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmattn.methods.base import Method
from vlmattn.methods.checks import Checks


@dataclass(frozen=True)
class Skipper(Checks, Method):
    """Leaves out decoder layers: what enters such a layer leaves it unchanged, and its cache stays empty."""

    kind: ClassVar[str] = "skip"

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """The decoder layers that are left out, ascending, in a model of `num_layers` layers; never layer 0, whose
        cache tells everybody how long the conversation is.

        Raises:
            LayerError: the model has no such layers.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement skipped(num_layers)")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """No token in a layer that is left out, all in the others."""
        left_out = () if self.is_noop else self.skipped(num_layers)
        return [0 if layer in left_out else visual for layer in range(num_layers)]
