"""How much a caption repeats itself: distinct-1 and the share of repeated 4-grams.

Words are runs of letters and digits, lower-cased, with inner apostrophes; punctuation is no word. A collapsed model
shows here first: its captions may even score well on hallucination, because they say the same few things again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from vlmattn.eval.tally import Formula, share

COLUMNS = ("worded", "distinct", "grams", "repeated")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def words(text: str) -> list[str]:
    """The lower-cased words of a text, in order."""
    return _WORD.findall(text.lower())


def distinct_1(tokens: Sequence[str]) -> float:
    """Distinct words / words; NaN without words."""
    return len(set(tokens)) / len(tokens) if tokens else math.nan


def repeated_grams(tokens: Sequence[str], n: int = 4) -> tuple[int, int]:
    """How many of a text's `n`-grams were there before in the same text, and how many `n`-grams it has."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)


def count(texts: Iterable[str]) -> list[float]:
    """The sums of `COLUMNS` over texts: texts with a word, their distinct-1, 4-grams, repeated 4-grams."""
    worded, distinct, grams, repeated = 0, 0.0, 0, 0
    for text in texts:
        tokens = words(text)
        if tokens:
            worded += 1
            distinct += distinct_1(tokens)
        again, total = repeated_grams(tokens)
        grams, repeated = grams + total, repeated + again
    return [worded, distinct, grams, repeated]


def formulas(start: int) -> tuple[Formula, ...]:
    """distinct-1 (mean over texts with a word) and the share of repeated 4-grams (over the 4-grams of all texts).

    Args:
        start: where `COLUMNS` begin among the columns of the kind.
    """
    worded, distinct, grams, repeated = (start + place for place in range(len(COLUMNS)))
    return (
        Formula("distinct_1", "distinct-1", share(distinct, worded)),
        Formula("repeated_4", "repeated 4-grams", share(repeated, grams), "lower"),
    )
