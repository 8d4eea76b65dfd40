"""A new pruning method. Import this file, then `vlmattn.wrap(model, "longest(keep=0.25)")`."""

from dataclasses import dataclass

from torch import Tensor

from vlmattn.methods.base import Pruner, View, register


@register("longest", title="Longest hidden vectors")
@dataclass(frozen=True)
class Longest(Pruner):
    """Keep the visual tokens with the longest hidden vectors."""

    needs = frozenset({"layer_input"})

    def score(self, view: View) -> Tensor:
        """`(B, V)` Euclidean lengths; the highest stay."""
        assert view.hidden is not None  # it is in `needs`
        return view.hidden.float().norm(dim=-1)
