"""Exact match: the answer is the label, blanks, case and a final period aside.

For questions with one short answer: a colour, a shape, a number, what is in a place, the digits of a plate.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmattn.eval.items import Item, Said
from vlmattn.eval.tally import Formula, Kind, share

COLUMNS = ("right", "total", "unparsed")


def normal(text: str) -> str:
    """What is compared: lower case, without blanks and without final periods."""
    return "".join(text.lower().split()).rstrip(".")


def is_right(item: Item, said: Said) -> bool:
    """Whether the raw text is the label after `normal`."""
    return normal(said.text) == normal(item.label)


def _count(pairs: Sequence[tuple[Item, Said]]) -> tuple[int, int, int]:
    texts = [(normal(said.text), normal(item.label)) for item, said in pairs]
    return sum(text == label for text, label in texts), len(texts), sum(not text for text, _ in texts)


KIND = Kind(
    name="exact",
    columns=COLUMNS,
    count=_count,
    formulas=(Formula("accuracy", "accuracy", share(COLUMNS.index("right"), COLUMNS.index("total")), of_marks=True),),
    mark=is_right,
    verdict=lambda item, said: normal(said.text),
)
"""Columns: right answers, answers, and answers that are empty after `normal` ("unparsed")."""
