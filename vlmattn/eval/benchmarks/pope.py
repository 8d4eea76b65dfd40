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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import DataError
from vlmattn.eval.items import Item

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


@dataclass(frozen=True)
class Counts:
    """Confusion counts with yes as positive; `other_*` are answers that are neither, by gold label."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0
    other_yes: int = 0
    other_no: int = 0

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Counts:
        """Count (gold label, parsed answer) pairs."""
        table = dict.fromkeys(_CELLS.values(), 0)
        for pair in pairs:
            table[_CELLS[pair]] += 1
        return cls(**table)

    @property
    def total(self) -> int:
        """All answers counted."""
        return sum(asdict(self).values())

    def metrics(self, strict: bool = False) -> dict[str, Any]:
        """Accuracy, precision, recall, F1, yes ratio; names with a zero denominator are 0 and listed in `undefined`.

        Raises:
            ZeroDivisionError: `strict` and a denominator is zero, as the paper's script does.
        """
        undefined: list[str] = []

        def ratio(name: str, part: float, whole: float) -> float:
            if whole:
                return part / whole
            if strict:
                raise ZeroDivisionError(f"{name} is undefined: its denominator is 0 ({self})")
            undefined.append(name)
            return 0.0

        precision = ratio("precision", self.tp, self.tp + self.fp)
        recall = ratio("recall", self.tp, self.tp + self.fn)
        return {
            "accuracy": ratio("accuracy", self.tp + self.tn, self.total),
            "precision": precision,
            "recall": recall,
            "f1": ratio("f1", 2 * precision * recall, precision + recall),
            "yes_ratio": ratio("yes_ratio", self.tp + self.fp, self.total),
            "gold_yes_ratio": ratio("gold_yes_ratio", self.tp + self.fn + self.other_yes, self.total),
            "undefined": undefined,
        }


_CELLS = {
    ("yes", "yes"): "tp",
    ("no", "yes"): "fp",
    ("no", "no"): "tn",
    ("yes", "no"): "fn",
    ("yes", "other"): "other_yes",
    ("no", "other"): "other_no",
}


def match(
    items: Sequence[Item], answers: Iterable[tuple[str, str]], failed: Collection[str] = ()
) -> list[tuple[Item, str]]:
    """Pair items with raw texts by id, in item order; items in `failed` are left out.

    Raises:
        DataError: an answer is missing, twice there, or belongs to no item; the ids are listed.
    """
    found: dict[str, str] = {}
    twice = []
    for key, text in answers:
        if key in found:
            twice.append(key)
        found[key] = text
    wanted = {item.id for item in items}
    missing = [item.id for item in items if item.id not in found and item.id not in failed]
    strange = [key for key in found if key not in wanted]
    problems = [
        f"{len(ids)} {what} ({_some(ids)})"
        for ids, what in ((missing, "without an answer"), (twice, "answered twice"), (strange, "not in the benchmark"))
        if ids
    ]
    if problems:
        raise DataError(f"the answers do not fit the {len(items)} items: " + "; ".join(problems))
    return [(item, found[item.id]) for item in items if item.id not in failed]


def score(
    items: Sequence[Item],
    answers: Iterable[tuple[str, str]],
    failed: Collection[str] = (),
    *,
    profile: str = "official",
    strict: bool = False,
) -> dict[str, Any]:
    """All POPE numbers of a run.

    Returns:
        `categories`: per category the metrics of `Counts.metrics`, the counts, `unparsed` and `failed`; `mean_f1` (the
        headline) and `mean_accuracy` over categories; `pooled`: the same over all rows; `undefined`: what had a zero
        denominator, as "category.metric".
    """
    pairs = match(items, answers, failed)
    groups = list(dict.fromkeys(item.group for item in items))
    result: dict[str, Any] = {"profile": profile, "categories": {}}
    for group in groups:
        lost = sum(item.group == group for item in items if item.id in failed)
        result["categories"][group] = _score_rows(
            [pair for pair in pairs if pair[0].group == group], profile, strict, lost
        )
    lost = sum(item.id in failed for item in items)
    result["pooled"] = _score_rows(pairs, profile, strict, lost)
    for name in ("f1", "accuracy"):
        values = [entry[name] for entry in result["categories"].values()]
        result[f"mean_{name}"] = sum(values) / len(values) if values else 0.0
    result["unparsed"], result["failed"] = result["pooled"]["unparsed"], lost
    result["undefined"] = [
        f"{group}.{name}" for group, entry in result["categories"].items() for name in entry["undefined"]
    ]
    return result


def counts_by_image(
    items: Sequence[Item],
    answers: Iterable[tuple[str, str]],
    failed: Collection[str] = (),
    *,
    profile: str = "official",
) -> dict[str, dict[str, Counts]]:
    """image -> category -> counts: what the image-clustered bootstrap resamples."""
    pairs: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for item, text in match(items, answers, failed):
        pairs.setdefault(item.image, {}).setdefault(item.group, []).append((item.label, parse(text, profile)))
    return {image: {group: Counts.of(rows) for group, rows in groups.items()} for image, groups in pairs.items()}


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
        if label not in ("yes", "no"):
            raise DataError(f"{where}, field 'label': {label!r} is neither 'yes' nor 'no'")
        image, text = _field(row, "image", (str,), where), _field(row, "text", (str,), where)
        items.append(Item(f"{category}/{key}", image, text, label, category))
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


def _score_rows(pairs: Sequence[tuple[Item, str]], profile: str, strict: bool, lost: int) -> dict[str, Any]:
    counts = Counts.of((item.label, parse(text, profile)) for item, text in pairs)
    unparsed = sum(is_unparsed(text, profile) for _, text in pairs)
    return {
        **counts.metrics(strict),
        "counts": asdict(counts),
        "total": counts.total,
        "unparsed": unparsed,
        "failed": lost,
    }


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + (f", ... {len(ids) - 8} more" if len(ids) > 8 else "")
