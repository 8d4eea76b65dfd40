"""Localisation answered in text: a bounding box, or the name of a place.

Boxes are (x0, y0, x1, y1), left, top, right and bottom as shares of the image's width and height. IoU is intersection
over union of the boxes as stated. Two profiles read a box:

- `feather` (markendo/FEATHER): the whole text is a Python list literal of four numbers in [0, 1] with x0 < x1 and
  y0 < y1, else the answer is invalid and its IoU 0; the gold box is rounded to two decimals first.
- `lmms_eval` (its bbox_rec tasks): the first `[a, b, c, d]` anywhere in the text, of any range and order; without one
  the answer is invalid and its box all zeros.

A rendered scene asks for a place by name instead; there the answer is right or wrong, and the rectangle of the named
place is compared with the object's box. An object is smaller than its place, so that IoU stays below 1 even where every
answer is right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks.exact import is_right, normal
from vlmattn.eval.items import Item, Said
from vlmattn.eval.tally import Formula, Kind, Scorer, share

Box = tuple[float, float, float, float]

HIT_IOU = 0.5
"""A box is right from this IoU on."""
BOX_COLUMNS = ("right", "iou", "total", "unparsed")
PLACE_COLUMNS = ("right", "total", "iou", "boxed", "unparsed")
_LITERAL = re.compile(r"\[\s*(?:[-+]?[\d.][\d.eE+-]*\s*,\s*){3}[-+]?[\d.][\d.eE+-]*\s*,?\s*\]")
_SIGNED = r"\s*(-?\d+(?:\.\d+)?)\s*"
_ANYWHERE = re.compile(rf"\[{_SIGNED},{_SIGNED},{_SIGNED},{_SIGNED}\]")


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 where they do not overlap, or one is reversed or empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    return inner / (_area(first) + _area(second) - inner)


def parse_feather(text: str) -> Box | None:
    """The box if the whole text is a list literal of four ordered numbers in [0, 1], else None."""
    text = text.strip()
    if not _LITERAL.fullmatch(text):
        return None
    try:
        x0, y0, x1, y1 = (float(number) for number in ast.literal_eval(text))
    except (SyntaxError, TypeError, ValueError, OverflowError):
        return None
    inside = all(0 <= number <= 1 for number in (x0, y0, x1, y1))
    return (x0, y0, x1, y1) if inside and x0 < x1 and y0 < y1 else None


def parse_lmms_eval(text: str) -> Box | None:
    """The first `[a, b, c, d]` in the text, neither its range nor its order checked; None without one."""
    found = _ANYWHERE.search(text)
    if found is None:
        return None
    x0, y0, x1, y1 = (float(number) for number in found.groups())
    return x0, y0, x1, y1


PROFILES: dict[str, Callable[[str], Box | None]] = {"feather": parse_feather, "lmms_eval": parse_lmms_eval}


def parse(text: str, profile: str = "feather") -> Box | None:
    """Read a box under a profile; None for an invalid answer, DataError for an unknown profile."""
    if profile not in PROFILES:
        raise DataError(f"box profile {profile!r} is unknown; there are {', '.join(PROFILES)}")
    return PROFILES[profile](text)


def gold_box(item: Item) -> Box:
    """The gold box of an item, `gold["box"]`.

    Raises:
        DataError: there is none, or it is not four ordered numbers in [0, 1]; the item is named.
    """
    wanted = "expected [x0, y0, x1, y1] as shares of width and height, x0 < x1 and y0 < y1"
    if "box" not in item.gold:
        raise DataError(f"item {item.id} has no gold 'box'; {wanted}")
    box = item.gold["box"]
    numbers = isinstance(box, (list, tuple)) and all(type(side) in (int, float) and 0 <= side <= 1 for side in box)
    if not numbers or len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
        raise DataError(f"item {item.id}, gold 'box': {box!r}; {wanted}")
    return box[0], box[1], box[2], box[3]


def answer_iou(item: Item, text: str, profile: str = "feather") -> float:
    """IoU of a box answer with the gold box of its item; 0 for an invalid answer."""
    gold, box = gold_box(item), parse(text, profile)
    if box is None:
        return 0.0
    if profile == "feather":
        gold = round(gold[0], 2), round(gold[1], 2), round(gold[2], 2), round(gold[3], 2)
    return iou(box, gold)


@cache
def box_kind(profile: str = "feather") -> Kind:
    """The kind "box": `accuracy` (acc@0.5, the hit rate), `iou` (mean) and `invalid` (share of unreadable answers).

    Raises:
        DataError: an unknown profile; while counting, an item without a valid gold box.
    """
    parse("", profile)

    def count(pairs: Sequence[tuple[Item, Said]]) -> list[float]:
        ious = [answer_iou(item, said.text, profile) for item, said in pairs]
        invalid = sum(parse(said.text, profile) is None for _, said in pairs)
        return [sum(value >= HIT_IOU for value in ious), sum(ious), len(ious), invalid]

    def verdict(item: Item, said: Said) -> str:
        box = parse(said.text, profile)
        return "invalid" if box is None else "[" + ", ".join(f"{side:g}" for side in box) + "]"

    right, overlap, total, unparsed = range(len(BOX_COLUMNS))
    return Kind(
        name="box",
        columns=BOX_COLUMNS,
        count=count,
        formulas=(
            Formula("accuracy", "acc@0.5", share(right, total), of_marks=True),
            Formula("iou", "mean IoU", share(overlap, total)),
            Formula("invalid", "invalid", share(unparsed, total), "lower"),
        ),
        mark=lambda item, said: answer_iou(item, said.text, profile) >= HIT_IOU,
        verdict=verdict,
    )


def place_kind(places: Mapping[str, Box]) -> Kind:
    """The kind "place": `hit` (the named place is the gold one), `iou` and `invalid` (the text names no place).

    IoU is that of the named place with `gold["box"]`, 0 where the text names none, averaged over the items that have a
    box.

    Args:
        places: name -> its rectangle.

    Raises:
        DataError: while counting, a label that is no place, or a malformed gold box.
    """
    table = {normal(name): box for name, box in places.items()}

    def named(item: Item, said: Said) -> Box | None:
        if normal(item.label) not in table:
            raise DataError(f"item {item.id}: label {item.label!r} is none of the places {', '.join(places)}")
        return table.get(normal(said.text))

    def count(pairs: Sequence[tuple[Item, Said]]) -> list[float]:
        boxes = [named(item, said) for item, said in pairs]
        boxed = [(box, gold_box(item)) for box, (item, _) in zip(boxes, pairs, strict=True) if "box" in item.gold]
        return [
            sum(is_right(item, said) for item, said in pairs),
            len(pairs),
            sum(iou(box, gold) for box, gold in boxed if box is not None),
            len(boxed),
            boxes.count(None),
        ]

    right, total, overlap, boxed, unparsed = range(len(PLACE_COLUMNS))
    return Kind(
        name="place",
        columns=PLACE_COLUMNS,
        count=count,
        formulas=(
            Formula("hit", "hit", share(right, total), of_marks=True),
            Formula("iou", "mean IoU", share(overlap, boxed)),
            Formula("invalid", "invalid", share(unparsed, total), "lower"),
        ),
        mark=is_right,
        verdict=lambda item, said: normal(said.text),
    )


def scorer(profile: str = "feather") -> Scorer:
    """Box answers scored per group.

    Raises:
        DataError: an unknown profile.
    """
    boxes = box_kind(profile)
    return Scorer(name="localisation", profile=profile, kind=lambda group: boxes)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
