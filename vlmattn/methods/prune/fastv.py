"""FastV: visual tokens that the last prompt token hardly looks at after two layers are dropped.

Idea: run the first K decoder layers on everything, rank the visual tokens by the attention they receive in layer K-1,
and let the remaining layers see only the best. Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv
2403.06764.

Deviations from the released code: every sample is ranked by its own attention (the code uses sample 0 for the batch);
the budget holds per image unless `budget_scope="sample"`; the score is one fp32 row computed beside SDPA instead of
eager attention; the selection is made once, at prefill (the cached form of the code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmattn.methods.base import Attention, Pruner, View, param, register

QUERIES = {"last": "last", "all_text": "text", "all": "all"}


@register("fastv", title="An Image is Worth 1/2 Tokens After Layer 2", paper="2403.06764")
@dataclass(frozen=True)
class FastV(Pruner):
    """Keep the visual tokens that the last prompt token attends to most in the layer before."""

    paper_layers: ClassVar[tuple[int, ...]] = (2,)
    min_layer: ClassVar[int] = 1

    query: str = param(
        "last", "whose attention counts: 'last' prompt token (code), 'all_text' tokens or 'all' (paper text)"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self._one_of("query", tuple(QUERIES))

    @property
    def attention(self) -> Attention:
        """Of the rows that `query` names."""
        return Attention(QUERIES[self.query])

    def score(self, view: View) -> Tensor:
        """`(B, V)` attention received, mean over heads."""
        assert view.scores is not None
        return view.scores
