"""Methods that decide about the KV cache: which keys and values of a layer stay after the prompt and later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmattn.edits import Eviction
from vlmattn.methods.base import Method
from vlmattn.methods.checks import Checks
from vlmattn.methods.views import CacheView, Watch


@dataclass(frozen=True)
class Evictor(Checks, Method):
    """Evicts keys and values from the caches of decoder layers; the prefill itself sees every token.

    A subclass implements `evict`, and what of the attention it is decided by in `watched`. What goes is removed from
    the tensors of the cache, each layer by itself, so that layers hold unequal numbers of tokens.
    """

    kind: ClassVar[str] = "prune"
    whole: ClassVar[bool] = False
    """Whether it chooses among all tokens of the prompt, so that nothing else may drop any."""

    def layers(self, num_layers: int) -> Sequence[int]:
        """The decoder layers whose caches it decides about."""
        return range(num_layers)

    @property
    def watched(self) -> Mapping[str, Watch]:
        """The attention that is wanted as `CacheView.scores`, by a name of the method's own."""
        return {}

    @property
    def static(self) -> bool:
        """Whether it decides after the prefill only and hides the same keys ever after. Guessed tokens can be taken
        back only then, so that others refuse assisted decoding."""
        return True

    @property
    def adaptive(self) -> bool:
        """Whether the number of visual tokens that stay depends on the image, so that `expected_tokens` is no more than
        their average."""
        return False

    def decides(self, step: int, new: int) -> bool:
        """Whether it watches a pass and decides after it.

        Args:
            step: tokens after the prompt up to this pass, its own included; 0 for the prefill.
            new: tokens of the pass; a further turn has several.
        """
        return step == 0

    def hides(self, step: int, new: int) -> bool:
        """Whether hidden keys are left out of a pass behind the prefill; arguments as in `decides`."""
        return True

    def evict(self, layers: Sequence[CacheView]) -> Sequence[Eviction]:
        """What happens to each of the layers that `layers(num_layers)` names, in that order."""
        raise NotImplementedError(f"{type(self).__name__} must implement evict(layers)")

    def cached(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """How many of the `visual` tokens of an image are left in the cache; `grid` as in `expected_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must implement cached(visual, grid)")

    def expected_tokens(self, visual: int, num_layers: int, grid: tuple[int, int, int] | None = None) -> list[int]:
        """Visual tokens that each layer's cache holds while the answer is written, for one image.

        The prefill computes all of them: these are the numbers of `session.report().cached_per_layer`, while
        `visual_per_layer` has `visual` in every layer.
        """
        counts = [visual] * num_layers
        if visual and not self.is_noop:
            for layer in self.layers(num_layers):
                counts[layer] = self.cached(visual, grid)
        return counts
