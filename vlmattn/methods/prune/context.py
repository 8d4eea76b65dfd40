"""Compressed context: describe the image once, then answer every question from the query and a few image tokens.

Idea: the tokens of the query "describe the image" hold global information about it, and the tokens that the description
looks at in the middle layers hold the details. Both together, as keys and values of the first pass, stand in for the
image in all later questions. Kaduri et al., "What's in the Image? A Deep-Dive into the Vision of Vision Language
Models", arXiv 2411.17491 (image re-prompting).

    session = vlmattn.wrap(model, "context(keep=0.05)", processor=processor)
    context = session.compress(image)                 # one prefill and one description
    context.answer("What colour is the car?")         # costs the question only
    context.answer("How many people are there?")

A plain `generate` has no second question and is refused when a prompt has an image.

The importance of an image token is the attention it receives from generated tokens, mean over heads, over these tokens
and over the middle layers; ceil(keep * V) of every image stay, in ALL layers and at their positions, with all text of
the prompt; the description goes. Cost: a whole prefill and a description for every image, before the first question.
It pays off from the second question on, and small things outside the description may be lost.

Deviations and choices: no official code is known to us, and the paper does not say how the compressed context is
represented: keys and values are our choice. So are the middle layers, floor(L / 4) to ceil(L / 2) - 1, which is the
paper's 20 to 39 of 80; 128 tokens of description, written greedily, at least 2 so that somebody looks at the image; the
answer "OK." that stands for the description, because chat templates want one between two questions. Videos count as one
image, which the paper did not try.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import Eviction, Keep
from vlmattn.errors import BudgetError, SpecError
from vlmattn.methods.base import param, register
from vlmattn.methods.compressor import Compressor
from vlmattn.methods.views import CacheView, Watch
from vlmattn.methods.window import check_window, window_layers


@register(
    "context", title="What's in the Image? A Deep-Dive into the Vision of Vision Language Models", paper="2411.17491"
)
@dataclass(frozen=True)
class Context(Compressor):
    """Answer questions from the query tokens and the few image tokens that a description looked at most."""

    keep: float | int = param(
        0.05, "share (float in [0, 1], rounded up) or number (int) of an image's tokens that stay"
    )
    middle: tuple[int | float, int | float] = param(
        (0.25, 0.5), "layers whose attention counts, first and the one behind the last: ints, or shares of the depth"
    )
    query: str = param("Describe the image.", "what the description is asked for with")
    new_tokens: int = param(128, "the longest description, in tokens")
    reply: str = param("OK.", "what stands for the description between the two questions; may be empty")

    def __post_init__(self) -> None:
        """Validate the fields."""
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if not number or self.keep < 0 or (isinstance(self.keep, float) and not self.keep <= 1):
            raise BudgetError(
                f"context.keep={self.keep!r}: expected a share in [0, 1] such as 0.05, or a number of tokens such as 32"
            )
        window = check_window(self.middle, "context.middle")
        object.__setattr__(self, "middle", window)
        if window[0] == window[1]:
            raise SpecError(f"context.middle={window!r}: no layer is left to look at; expected such as (0.25, 0.5)")
        for name in ("query", "reply"):
            if not isinstance(getattr(self, name), str):
                raise SpecError(f"context.{name}={getattr(self, name)!r}: expected a text")
        self._count("new_tokens", 2)

    def disabled(self) -> None:
        """Nothing: it has no strength."""

    def layers(self, num_layers: int) -> Sequence[int]:
        """The middle layers."""
        return window_layers(self.middle, num_layers, str(self))

    @property
    def watched(self) -> dict[str, Watch]:
        """What the token of a step looks at, mean over heads."""
        return {"received": Watch(rows="all", total=True)}

    def decides(self, step: int, new: int) -> bool:
        """After every token of the description."""
        return step > 0

    def evict(self, layers: Sequence[CacheView]) -> Sequence[Eviction]:
        """Nothing yet: what generated tokens look at is summed up."""
        return [
            Eviction(state={"received": view.scores["received"] + view.state.get("received", 0.0)}) for view in layers
        ]

    def importance(self, layers: Sequence[CacheView]) -> Tensor:
        """`(B, S)` fp32 attention received, mean over the generated tokens and the middle layers."""
        received = torch.stack([view.state["received"] for view in layers]).mean(0)
        return received / layers[0].step

    def select(self, importance: Tensor, image: Tensor) -> Keep:
        """The most important tokens of every image."""
        images = int(image.max()) + 1
        counts = [[self.cached(int((row == i).sum())) for i in range(images)] for row in image]
        return Keep.top(importance, image, torch.tensor(counts, dtype=torch.long, device=image.device))

    def cached(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """ceil(keep * V) for a share."""
        # shares such as 0.1 are not exact
        wanted = math.ceil(round(self.keep * visual, 9)) if isinstance(self.keep, float) else self.keep
        return min(wanted, visual)
