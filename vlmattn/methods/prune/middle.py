"""Middle layers only: the text reads the image in the middle layers, and nowhere else.

Idea: in "What's in the Image?" (Kaduri et al., arXiv 2411.17491) descriptions keep most of their objects if the image
is visible only in the middle quarter of the layers. Then its keys and values need not be kept in the others: after the
prefill they leave the caches, which equals masking them.

Deviations and choices: no official code is known to us. The paper's 0.75 to 0.81 (object F1) are for image to generated
text with one model of 80 layers and captions only; other tasks may need other layers. The window for other depths is
floor(L / 4) to ceil(L / 2) - 1. Whether the text of the prompt is cut off as well is a switch, off by default. The
image tokens themselves attend to each other in all layers, so that the prefill costs what it costs without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from vlmattn.edits import Eviction
from vlmattn.methods.attend.knockout import Knockout
from vlmattn.methods.base import Method, param, register
from vlmattn.methods.cache import Evictor
from vlmattn.methods.views import CacheView
from vlmattn.methods.window import check_window, window_layers


@register(
    "middle", title="What's in the Image? A Deep-Dive into the Vision of Vision Language Models", paper="2411.17491"
)
@dataclass(frozen=True)
class Middle(Evictor):
    """Let text read the image in the middle layers only, and free its keys and values elsewhere."""

    window: tuple[int | float, int | float] = param(
        (0.25, 0.5), "the layers that see the image, first and the one behind the last: ints, or shares of the depth"
    )
    block_prefill_text: bool = param(False, "whether the prompt's text behind the image is cut off from it as well")
    block_decode: bool = param(True, "whether what comes after the prompt is: its keys and values leave the caches")

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "window", check_window(self.window, "middle.window"))
        self._flag("block_prefill_text", "block_decode")

    @property
    def is_noop(self) -> bool:
        """True if nothing is cut off."""
        return not (self.block_prefill_text or self.block_decode)

    def disabled(self) -> Middle:
        """The same window with nothing cut off."""
        return dataclasses.replace(self, block_prefill_text=False, block_decode=False)

    def parts(self, num_layers: int) -> tuple[Method, ...]:
        """The eviction, and a knock-out on each side of the window."""
        seen = window_layers(self.window, num_layers, str(self))
        sides = [(0, seen.start), (seen.stop, num_layers)] if seen else [(0, num_layers)]
        blocked = [Knockout(window=side, rows="query") for side in sides if self.block_prefill_text]
        return (*([self] if self.block_decode else []), *blocked)

    def layers(self, num_layers: int) -> Sequence[int]:
        """The layers outside the window."""
        seen = window_layers(self.window, num_layers, str(self))
        return [layer for layer in range(num_layers) if layer not in seen]

    def evict(self, layers: Sequence[CacheView]) -> Sequence[Eviction]:
        """All visual tokens."""
        return [Eviction(keep=~view.visual) for view in layers]

    def cached(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """None of them."""
        return 0

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """As every evictor; all of them where later tokens are not cut off."""
        return super().expected_tokens(visual, num_layers, grid) if self.block_decode else [visual] * num_layers
