"""Random pruning: the floor every method must beat (UniPruneBench, arXiv 2511.02650, finds many that do not).

One draw per sample and image. The generator lives on the CPU and is seeded by (seed, text of the sample, pixels of the
image), so the set depends neither on the batch, the padding nor the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import SpecError
from vlmattn.methods.base import Pruner, View, param, register


@register("random", title="Random subset (baseline)")
@dataclass(frozen=True)
class Random(Pruner):
    """Keep a uniform random subset of the visual tokens."""

    seed: int = param(0, "seed of the draw; report at least three")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SpecError(f"random.seed={self.seed!r}: expected an int >= 0")

    @property
    def needs(self) -> frozenset[str]:
        """A key of the content, to draw the same set for the same sample in any batch."""
        return frozenset({"content_key"})

    def score(self, view: View) -> Tensor:
        """`(B, V)` one number in [0, 1) a token."""
        assert view.keys is not None
        scores = torch.zeros(view.image.shape, dtype=torch.float64)
        index, image = view.index.cpu(), view.image.cpu()
        for row, spans in enumerate(view.spans):
            for span, key in zip(spans, view.keys[row], strict=True):
                generator = torch.Generator().manual_seed((key * 1_000_003 + self.seed) % 2**63)
                draw = torch.rand(span.length, generator=generator, dtype=torch.float64)
                mine = image[row] == span.image
                scores[row, mine] = draw[index[row, mine]]
        return scores.to(view.image.device)
