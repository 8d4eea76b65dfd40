"""Attention knock-out: in a window of layers the text does not see the image, and what changes tells where it looks.

Idea: cut the attention from text rows to visual keys in some layers only and read off the answers what flowed there.
"What's in the Image?" (Kaduri et al., arXiv 2411.17491) found that way that hardly anything but the middle quarter of
the layers moves image information into the text. An analysis, not a way to better answers.

The probabilities of what is hidden are exactly 0 and the others sum to 1, as if the keys were masked; nothing is
removed from the cache (`middle` does that). A row always sees itself. Deviations: no official code is known to us;
which rows are cut is our reading of the paper's two experiments, image to query text and image to generated text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vlmattn.edits import TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, AttnEdit
from vlmattn.methods.base import Editor, param, register
from vlmattn.methods.checks import Checks
from vlmattn.methods.window import check_window, window_layers

ROWS = {"text": ("text", True), "query": ("text", False), "generated": ("generated", True), "last": ("last", True)}
KEYS = {"visual": (VISUAL, VISUAL_SINK), "text": (TEXT, TEXT_SINK)}


@register(
    "knockout",
    title="What's in the Image? A Deep-Dive into the Vision of Vision Language Models (attention knock-out)",
    paper="2411.17491",
)
@dataclass(frozen=True)
class Knockout(Checks, Editor):
    """Hide the image from text rows in a window of layers."""

    window: tuple[int | float, int | float] = param(
        (0.0, 1.0), "first layer and the one behind the last: ints, or shares of the depth; (0.25, 0.5): the middle"
    )
    rows: str = param(
        "text",
        "whose view is cut: 'text' behind the image and generated tokens, 'query': the text only, 'generated' tokens "
        "only, or the 'last' prompt token and generated ones",
    )
    keys: str = param("visual", "what is hidden: 'visual' keys, or 'text' keys (a row still sees itself)")

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "window", check_window(self.window, "knockout.window"))
        self._one_of("rows", tuple(ROWS))
        self._one_of("keys", tuple(KEYS))

    @property
    def is_noop(self) -> bool:
        """True for an empty window such as (3, 3)."""
        return self.window[0] == self.window[1]

    def disabled(self) -> Knockout:
        """The same knock-out in no layer."""
        return dataclasses.replace(self, window=(0, 0))

    def layers(self, num_layers: int) -> range:
        """The layers of the window."""
        return window_layers(self.window, num_layers, str(self))

    def edit(self, layer: int) -> AttnEdit:
        """Hide the keys from the rows."""
        rows, generated = ROWS[self.rows]
        return AttnEdit(hide=KEYS[self.keys], rows=rows, generated=generated)
