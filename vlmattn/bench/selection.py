"""What choosing tokens takes: every pruner's own work, beside the unpruned prefill of the same round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import Tensor

from vlmattn import spec as specs
from vlmattn.errors import VlmattnError
from vlmattn.methods.base import Selector
from vlmattn.methods.cache import Evictor
from vlmattn.methods.compressor import Compressor
from vlmattn.session import wrap

KEEP = 0.3
BOUND = 0.03
"""The largest share of the unpruned prefill that a selector should take."""
ALSO = (f"cdpruner(keep={KEEP}, relevance=embeddings)",)
"""Settings under which methods run that the model refuses by default."""


@dataclass
class Choosing:
    """One pruner.

    Attributes:
        spec: as it is installed.
        refused: why it was not measured; "" if it was.
        seconds: per round what `Session.time_selection` says: looks inside the tower, scores and decisions.
    """

    spec: str
    refused: str = ""
    seconds: list[float] = field(default_factory=list)


def selectors() -> list[str]:
    """Every registered method that chooses among tokens in a prefill, with one budget for all that take one."""
    found = []
    for name, info in specs.registry().items():
        chooses = issubclass(info.cls, Selector | Evictor) and not issubclass(info.cls, Compressor)
        if chooses and not info.cls().is_noop:
            takes = any(field["name"] == "keep" for field in info.fields)
            found.append(f"{name}(keep={KEEP})" if takes else name)
    return [*found, *ALSO]


def warm_up(model: Any, inputs: dict[str, Tensor], say: Callable[[str], None]) -> list[Choosing]:
    """Run every pruner once; those that the model refuses keep the reason."""
    found = []
    for spec in selectors():
        say(f"warming up: {spec}")
        choosing = Choosing(spec)
        try:
            run(choosing, model, inputs)
        except VlmattnError as error:
            choosing.refused = str(error)
        choosing.seconds.clear()
        found.append(choosing)
    return found


def run(choosing: Choosing, model: Any, inputs: dict[str, Tensor]) -> None:
    """One prefill; notes how long choosing took."""
    with wrap(model, choosing.spec) as session:
        session.time_selection()
        model(**inputs, logits_to_keep=1, use_cache=True)
        milliseconds = session.report().selection_ms
    assert milliseconds is not None
    choosing.seconds.append(milliseconds / 1000)


def summary(choosing: Choosing, plain: Sequence[float]) -> dict[str, Any]:
    """Median, and the median share of `plain`, the unpruned prefills of the same rounds in seconds."""
    if choosing.refused:
        return {"spec": choosing.spec, "refused": choosing.refused}
    shares = [mine / theirs for mine, theirs in zip(choosing.seconds, plain, strict=True)]
    share = float(numpy.median(shares))
    return {
        "spec": choosing.spec,
        "ms": 1000 * float(numpy.median(choosing.seconds)),
        "share_of_prefill": share,
        "largest_share": max(shares),
        "met": share < BOUND,
        "raw_s": choosing.seconds,
    }


def page(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the section about choosing, the most expensive first."""
    measured = sorted((row for row in rows if "share_of_prefill" in row), key=lambda row: -row["share_of_prefill"])
    above = [f"`{row['spec']}`" for row in measured if not row["met"]]
    lines = [
        "## Choosing tokens",
        "",
        "Looks inside the vision tower, scores and decisions of each pruner, as a share of the unpruned prefill of the "
        f"same round; the bound is {BOUND:.0%}. The vision tower of this model is tiny, so that what methods compute "
        "from a large one is not in these numbers.",
        "",
        f"Above the bound: {', '.join(above)}." if above else "All are below the bound.",
        "",
        "| pruner | ms | share of the unpruned prefill | largest of all rounds | below the bound |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in measured:
        shares = f"{row['share_of_prefill']:.2%} | {row['largest_share']:.2%}"
        lines.append(f"| `{row['spec']}` | {row['ms']:.1f} | {shares} | {'yes' if row['met'] else 'no'} |")
    refused = [f"- `{row['spec']}`: {row['refused']}" for row in rows if "refused" in row]
    return [*lines, *(["", "Not measured, because this model refuses them:", "", *refused] if refused else [])]
