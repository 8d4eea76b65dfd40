"""POPE: is there an X in the image? Yes or no, with random, popular and adversarial absent objects.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", 2023 (arXiv 2305.10355). `yes` is the
positive class. Two parser profiles, which read the same raw text differently and never touch the data:

- `official`: the paper's script (others copied it): the first sentence without commas is split on blanks; one piece
  equal to `No`, `no` or `not` makes it "no", anything else, even an empty text, is "yes".
- `lmms_eval`: the text must be exactly yes or no after `lower().strip()`; anything else is "other": wrong for the
  accuracy, left out of precision and recall.

Deviations: answers are matched by id (the scripts zip by line); a zero denominator gives 0 and a flag (the script
crashes; `strict=True` raises); the yes ratio counts predictions in both profiles (lmms-eval prints the share of gold
labels, which is here as `gold_yes_ratio`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.errors import DataError
from vlmattn.eval.items import Item, Said
from vlmattn.eval.tally import Aggregate, Formula, Kind, Scorer, Sums, ratio

PAPER = "2305.10355"
CATEGORIES = ("random", "popular", "adversarial")
URL = "https://github.com/RUCAIBox/POPE (folder output/coco)"
IMAGES_URL = "http://images.cocodataset.org/zips/val2014.zip"
PROMPTS = {
    "bare": "{question}",
    "single_word": "{question}\nAnswer the question using a single word or phrase.",
}
# SHA-256 of RUCAIBox/POPE at 109985c (2023-11-16); older versions have typing errors or fewer rows and score otherwise.
CURRENT_FILES = {
    "random": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
    "popular": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
    "adversarial": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
}


def prompt(question: str, template: str) -> str:
    """The text shown to the model: `bare` is the question, `single_word` adds lmms-eval's instruction."""
    if template not in PROMPTS:
        raise DataError(f"prompt template {template!r} is unknown; there are {', '.join(PROMPTS)}")
    return PROMPTS[template].format(question=question)


def parse_official(text: str) -> str:
    """ "yes" or "no" by the rule of the paper's script: case-sensitive, no trimming, everything unclear is yes."""
    pieces = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if any(piece in ("No", "no", "not") for piece in pieces) else "yes"


def parse_lmms_eval(text: str) -> str:
    """ "yes", "no" or "other" by the rule of lmms-eval: the whole text must be the word."""
    word = text.lower().strip()
    return word if word in ("yes", "no") else "other"


PROFILES: dict[str, Callable[[str], str]] = {"official": parse_official, "lmms_eval": parse_lmms_eval}


def parse(text: str, profile: str = "official") -> str:
    """Read a raw answer under a profile: "yes", "no" or (lmms_eval) "other"."""
    if profile not in PROFILES:
        raise DataError(f"parser profile {profile!r} is unknown; there are {', '.join(PROFILES)}")
    return PROFILES[profile](text)


def is_unparsed(text: str, profile: str = "official") -> bool:
    """Whether the text says neither yes nor no under the profile's reading.

    `official` has no third outcome, so there it means: counted as yes although the first sentence has no word "yes".
    """
    if profile == "official":
        return parse_official(text) == "yes" and not re.search(r"\byes\b", text.split(".", 1)[0].lower())
    return parse(text, profile) == "other"


def gold(item: Item) -> str:
    """The gold label of a yes/no question, in lower case.

    Raises:
        DataError: it is neither yes nor no; the item is named.
    """
    label = item.label.lower()
    if label not in ("yes", "no"):
        raise DataError(f"item {item.id} (image {item.image}): the label {item.label!r} is neither 'yes' nor 'no'")
    return label


COLUMNS = ("tp", "fp", "tn", "fn", "other_yes", "other_no", "unparsed", "total")
_TP, _FP, _TN, _FN, _OTHER_YES, _OTHER_NO, _UNPARSED, _TOTAL = range(len(COLUMNS))
_CELLS = {
    ("yes", "yes"): _TP,
    ("no", "yes"): _FP,
    ("no", "no"): _TN,
    ("yes", "no"): _FN,
    ("yes", "other"): _OTHER_YES,
    ("no", "other"): _OTHER_NO,
}


def _accuracy(sums: Sums) -> Sums:
    return ratio(sums[..., _TP] + sums[..., _TN], sums[..., _TOTAL])


def _f1(sums: Sums) -> Sums:
    """2TP / (2TP + FP + FN); undefined without a true positive, where precision + recall is 0."""
    hits = 2 * sums[..., _TP]
    return ratio(hits, np.where(hits > 0, hits + sums[..., _FP] + sums[..., _FN], 0))


FORMULAS = (
    Formula("accuracy", "accuracy", _accuracy, of_marks=True),
    Formula("precision", "precision", lambda sums: ratio(sums[..., _TP], sums[..., _TP] + sums[..., _FP])),
    Formula("recall", "recall", lambda sums: ratio(sums[..., _TP], sums[..., _TP] + sums[..., _FN])),
    Formula("f1", "F1", _f1),
    Formula(
        "yes_ratio", "yes ratio", lambda sums: ratio(sums[..., _TP] + sums[..., _FP], sums[..., _TOTAL]), "neither"
    ),
    Formula(
        "gold_yes_ratio",
        "gold yes ratio",
        lambda sums: ratio(sums[..., _TP] + sums[..., _FN] + sums[..., _OTHER_YES], sums[..., _TOTAL]),
        "neither",
    ),
)


@cache
def kind(profile: str = "official") -> Kind:
    """The yes/no kind under a parser profile.

    Columns are the confusion counts with yes as positive; `other_yes` and `other_no` are answers that are neither, by
    gold label: wrong for the accuracy, out of precision and recall; `unparsed` counts by `is_unparsed`.

    Raises:
        DataError: an unknown profile.
    """
    parse("", profile)
    read = PROFILES[profile]

    def count(pairs: Sequence[tuple[Item, Said]]) -> list[int]:
        row = [0] * len(COLUMNS)
        for item, said in pairs:
            row[_CELLS[gold(item), read(said.text)]] += 1
            row[_UNPARSED] += is_unparsed(said.text, profile)
        row[_TOTAL] = len(pairs)
        return row

    return Kind(
        name="yes_no",
        columns=COLUMNS,
        count=count,
        formulas=FORMULAS,
        mark=lambda item, said: read(said.text) == gold(item),
        verdict=lambda item, said: read(said.text),
    )


MEANS = (
    Aggregate("mean_f1", "mean F1", "yes_no", "f1"),
    Aggregate("mean_accuracy", "mean accuracy", "yes_no", "accuracy"),
)
"""Means over the categories: the headlines."""
POOLED = tuple(
    Aggregate(f"pooled_{formula.name}", f"pooled {formula.title}", "yes_no", formula.name, how="pool")
    for formula in FORMULAS
)
"""The same formulas over the rows of all categories together."""


def scorer(profile: str = "official") -> Scorer:
    """POPE's numbers: per category, their means (`mean_f1`, `mean_accuracy`) and `pooled_*` over all rows.

    Raises:
        DataError: an unknown profile.
    """
    questions = kind(profile)
    return Scorer(
        name="pope",
        profile=profile,
        kind=lambda group: questions,
        aggregates=MEANS + POOLED,
        headlines=tuple(mean.name for mean in MEANS),
    )


def load(folder: str | Path) -> tuple[tuple[Item, ...], dict[str, str]]:
    """Read the three question files of a folder (JSON lines: question_id, image, text, label).

    A category's file is the one whose name contains "pope" and ends in `_<category>.json` or `.jsonl`.

    Returns:
        Items with ids "<category>/<question_id>", and file name -> SHA-256.

    Raises:
        DataError: a file is missing or there are two of a category, or a row breaks the schema (file, line and field
        are named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data wants the folder with the three POPE files from {URL}")
    items: list[Item] = []
    hashes: dict[str, str] = {}
    for category in CATEGORIES:
        path = _file(folder, category)
        data = path.read_bytes()
        hashes[path.name] = hashlib.sha256(data).hexdigest()
        items += _rows(path, data, category)
    return tuple(items), hashes


def version(hashes: Mapping[str, str]) -> str:
    """Which version of the original files these are, in words."""
    if set(hashes.values()) == set(CURRENT_FILES.values()):
        return "RUCAIBox/POPE 109985c (2023-11-16)"
    return "not the current files of RUCAIBox/POPE (109985c): numbers are comparable only with the same hashes"


def _file(folder: Path, category: str) -> Path:
    endings = (f"_{category}.json", f"_{category}.jsonl")
    found = sorted(path for path in folder.iterdir() if "pope" in path.name.lower() and path.name.endswith(endings))
    if not found:
        raise DataError(
            f"{folder} has no POPE file for {category!r} (wanted "
            f"coco_pope_{category}.json); fetch the three files from {URL}"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(
            f"{folder} has {len(found)} POPE files for {category!r} ({names}): put each set into a folder of its own"
        )
    return found[0]


def _rows(path: Path, data: bytes, category: str) -> list[Item]:
    items: list[Item] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); the file must hold one JSON object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        key = str(_field(row, "question_id", (int, str), where))
        if key in seen:
            raise DataError(f"{where}, field 'question_id': {key} was already used in line {seen[key]}")
        seen[key] = number
        label = _field(row, "label", (str,), where)
        if label.lower() not in ("yes", "no"):
            raise DataError(f"{where}, field 'label': {label!r} is neither 'yes' nor 'no'")
        image, text = _field(row, "image", (str,), where), _field(row, "text", (str,), where)
        items.append(Item(f"{category}/{key}", image, text, label.lower(), category))
    if not items:
        raise DataError(f"{path} has no rows; fetch it again from {URL}")
    return items


def _field(row: Mapping[str, Any], name: str, types: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}, field {name!r}: missing (the row has {', '.join(row) or 'no fields'})")
    value = row[name]
    if not isinstance(value, types) or isinstance(value, bool) or value == "":
        wanted = " or ".join({"int": "a number", "str": "a text"}[kind.__name__] for kind in types)
        raise DataError(f"{where}, field {name!r}: expected {wanted}, found {value!r}")
    return value
