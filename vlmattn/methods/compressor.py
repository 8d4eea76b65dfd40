"""What a method implements that makes of an image a short context for many questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.methods.cache import Evictor
from vlmattn.methods.views import CacheView


class Compressor(Evictor):
    """Has the image described, notes what the description looks at, and keeps a part of the prompt's visual tokens.

    It acts through `session.compress`. While the description is written it is an `Evictor` that evicts nothing. A
    subclass is a frozen dataclass with the fields below.

    Attributes:
        query: what the description is asked for with.
        new_tokens: the longest description, at least 2 tokens.
        reply: what stands for the description in the conversation.
    """

    through: ClassVar[str] = "session.compress(image).answer(question)"
    whole: ClassVar[bool] = True

    query: str
    new_tokens: int
    reply: str

    @property
    def static(self) -> bool:
        """False: it watches the tokens of the description."""
        return False

    def importance(self, layers: Sequence[CacheView]) -> Tensor:
        """`(B, S)` fp32 over the conversation so far, from what `evict` left as state of its layers."""
        raise NotImplementedError(f"{type(self).__name__} must implement importance(layers)")

    def select(self, importance: Tensor, image: Tensor) -> Keep:
        """The visual tokens that stay, in all layers.

        Args:
            importance: `(B, N)` over the prompt.
            image: `(B, N)` long, index of the image within the sample, -1 for text.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement select(importance, image)")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """Visual tokens that each layer's cache holds while questions are answered."""
        return [self.cached(visual, grid)] * num_layers
