"""MME: two questions about an image, one whose answer is Yes and one whose answer is No; acc and acc+.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", 2023 (arXiv 2306.13394).
acc is the share of right answers, acc+ the share of images with both answers right, the score of a subtask
100 (acc + acc+), at most 200. Perception is the sum over ten subtasks, cognition over four; the hallucination subset
sums existence, count, position and color.

Parser profiles; an answer that is neither yes nor no is "other", wrong in both acc and acc+:

- `official`: the tool of the paper: lower case, not trimmed; yes or no if that is the text or stands among the first
  four characters (yes is looked for first).
- `lmms_eval`: trimmed and without periods; the letters y and n count; else the same four characters.
- `vlmevalkit`: punctuation is taken out, then the words must hold one of yes and no and not the other.
- `avisc`: no if a word of the whole text is No, not, no, NO or ends in n't, else yes; nothing is other.

Deviation: pairs are formed by subtask and image (the tool takes lines 2k and 2k + 1, whatever they are about). A
question that could not be answered is left out of acc, and its image out of acc+.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from vlmattn.errors import DataError, nearest
from vlmattn.eval.items import Item, Said
from vlmattn.eval.tally import Aggregate, Formula, Kind, Scorer, Sums, share

PAPER = "2306.13394"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
HALLUCINATION = ("existence", "count", "position", "color")
"""Object level (existence, count) and attribute level (position, color)."""

COLUMNS = ("right", "total", "both", "images", "unparsed")
_RIGHT, _TOTAL, _BOTH, _IMAGES, _ = range(len(COLUMNS))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def _first_four(text: str) -> str:
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def parse_official(text: str) -> str:
    """ "yes", "no" or "other" by the first four characters of the lower-cased text; leading blanks count."""
    return _first_four(text.lower())


def parse_lmms_eval(text: str) -> str:
    """ "yes", "no" or "other" like `parse_official`, after trimming and without periods; y and n count."""
    word = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(word) or _first_four(word)


def parse_vlmevalkit(text: str) -> str:
    """ "yes" or "no" if the words hold that one and not the other, else "other".

    A punctuation mark that touches a blank anywhere is deleted everywhere, any other becomes a blank; all are deleted
    where the text has a comma between digits. Periods away from digits go too, the first 32 of them.
    """
    whole = text.lower()
    delete_all = _DIGIT_COMMA_DIGIT.search(whole) is not None
    clean = whole
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in whole or f" {mark}" in whole
        clean = clean.replace(mark, "" if delete_all or beside_blank else " ")
    words = _LONE_PERIOD.sub("", clean, count=_MOST_PERIODS).split()
    if ("yes" in words) == ("no" in words):
        return "other"
    return "yes" if "yes" in words else "no"


def parse_avisc(text: str) -> str:
    """ "no" if a piece of the text without periods and commas is a negation, else "yes"; case counts."""
    pieces = text.replace(".", "").replace(",", "").split(" ")
    return "no" if any(piece in ("No", "not", "no", "NO") or piece.endswith("n't") for piece in pieces) else "yes"


PROFILES: dict[str, Callable[[str], str]] = {
    "official": parse_official,
    "lmms_eval": parse_lmms_eval,
    "vlmevalkit": parse_vlmevalkit,
    "avisc": parse_avisc,
}


def parse(text: str, profile: str = "official") -> str:
    """Read a raw answer under a profile: "yes", "no" or "other"; DataError for an unknown profile."""
    if profile not in PROFILES:
        raise DataError(f"parser profile {profile!r} is unknown; there are {', '.join(PROFILES)}")
    return PROFILES[profile](text)


def check_pair(items: Sequence[Item]) -> None:
    """Whether the questions of one subtask about one image are a pair.

    Raises:
        DataError: there are not two, or their answers are not one Yes and one No; subtask and image are named.
    """
    labels = sorted(item.label.lower() for item in items)
    if labels == ["no", "yes"]:
        return
    found = ", ".join(f"{item.id}: {item.label}" for item in items[:4]) + (", ..." if len(items) > 4 else "")
    raise DataError(
        f"subtask {items[0].group!r}, image {items[0].image!r}: acc+ needs two questions, one whose answer is Yes and "
        f"one whose answer is No; there {'is' if len(items) == 1 else 'are'} {len(items)} ({found})"
    )


def _score(sums: Sums) -> Sums:
    return 100 * (share(_RIGHT, _TOTAL)(sums) + share(_BOTH, _IMAGES)(sums))


@cache
def kind(profile: str = "official") -> Kind:
    """The kind "pairs" under a parser profile: `score` (0 to 200), `accuracy` (acc) and `accuracy_plus` (acc+).

    Raises:
        DataError: an unknown profile.
    """
    parse("", profile)
    read = PROFILES[profile]

    def count(pairs: Sequence[tuple[Item, Said]]) -> list[int]:
        parsed = [read(said.text) for _, said in pairs]
        right = sum(word == item.label.lower() for word, (item, _) in zip(parsed, pairs, strict=True))
        whole = len(pairs) == 2
        return [right, len(pairs), int(whole and right == 2), int(whole), parsed.count("other")]

    return Kind(
        name="pairs",
        columns=COLUMNS,
        count=count,
        formulas=(
            Formula("score", "acc + acc+", _score, percent=False),
            Formula("accuracy", "acc", share(_RIGHT, _TOTAL), of_marks=True),
            Formula("accuracy_plus", "acc+", share(_BOTH, _IMAGES)),
        ),
        mark=lambda item, said: read(said.text) == item.label.lower(),
        verdict=lambda item, said: read(said.text),
        check=check_pair,
    )


def scorer(profile: str = "official") -> Scorer:
    """MME's numbers: per subtask, and the sums `perception` (0 to 2000), `cognition` (0 to 800), `hallucination` (0 to
    800), each only where all its subtasks are there.

    Raises:
        DataError: an unknown profile.
    """
    pairs = kind(profile)

    def kind_of(group: str) -> Kind:
        if group not in SUBTASKS:
            raise DataError(f"{group!r} is not a subtask of MME; {nearest(group, SUBTASKS)}")
        return pairs

    parts = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
    return Scorer(
        name="mme",
        profile=profile,
        kind=kind_of,
        aggregates=tuple(
            Aggregate(name, name, "pairs", "score", how="sum", groups=part) for name, part in parts.items()
        ),
    )
