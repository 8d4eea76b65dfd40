"""What a benchmark is to the runner: a list of items, a way to open their images, and a pure scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmattn.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn.eval.tally import Scorer


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
        id: unique in the benchmark, for instance "random/17".
        image: name of the image, the cluster of the bootstrap.
        question: what is asked, before a prompt template is put around it.
        label: the gold answer.
        group: category or task the metrics are split by.
        gold: what scoring needs beyond the label, JSON-able: {"objects": [...]} of a caption, {"box": [...]} of a
            localisation; empty for most.
    """

    id: str
    image: str
    question: str
    label: str
    group: str
    gold: Mapping[str, Any] = field(default_factory=dict)


class Said(NamedTuple):
    """What the model said to one item.

    Attributes:
        id: of the item.
        text: raw answer.
        truncated: whether the answer was cut at the token limit.
        margin: logit of "yes" minus logit of "no" at the first answer token; None where it was not taken.
    """

    id: str
    text: str
    truncated: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """Items with everything needed to ask and to score them.

    Attributes:
        name: "pope" or "scenes".
        items: what is asked, in a fixed order.
        open_image: name of an image -> PIL image; raises OSError or ValueError for a broken one.
        scorer: answers -> numbers; its `profile` says how answers are read.
        sha256: hash of the data.
        source: where the data came from, in words.
        prompt: name of the prompt template.
        files: file name -> SHA-256, empty for rendered data.
        pictures: where the images can be found again without the benchmark, JSON-able:
            {"scenes": split, "world": name} or {"folder": path}.
        validation: makes the same kind of benchmark from other images, for whatever is tuned; None where there is none.
    """

    name: str
    items: tuple[Item, ...]
    open_image: Callable[[str], Image]
    scorer: Scorer
    sha256: str
    source: str
    prompt: str = "bare"
    files: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    validation: Callable[[], Benchmark] | None = None

    def take(self, limit: int | None) -> tuple[Item, ...]:
        """The first `limit` items of every group, in benchmark order; all of them for None.

        Items that are scored together, like the two questions of a pair, are not torn apart: an image that was begun is
        finished.
        """
        if limit is None:
            return self.items
        seen: dict[str, int] = {}
        begun: set[tuple[str, str]] = set()
        chosen = []
        for item in self.items:
            seen[item.group] = seen.get(item.group, 0) + 1
            if seen[item.group] <= limit:
                chosen.append(item)
                if self.scorer.kind(item.group).check is not None:
                    begun.add((item.group, item.image))
            elif (item.group, item.image) in begun:
                chosen.append(item)
        return tuple(chosen)


def match(items: Sequence[Item], said: Iterable[Said], failed: Collection[str] = ()) -> list[tuple[Item, Said]]:
    """Pair items with answers by id, in item order; items in `failed` are left out.

    Raises:
        DataError: an answer is missing, twice there, or belongs to no item, or two items have one id; the ids are
            listed.
    """
    found: dict[str, Said] = {}
    twice = []
    for answer in said:
        if answer.id in found:
            twice.append(answer.id)
        found[answer.id] = answer
    wanted = Counter(item.id for item in items)
    missing = [item.id for item in items if item.id not in found and item.id not in failed]
    strange = [key for key in found if key not in wanted]
    problems = [
        f"{len(ids)} {what} ({some(ids)})"
        for ids, what in (
            (missing, "without an answer"),
            (twice, "answered twice"),
            (strange, "not in the benchmark"),
            ([key for key, times in wanted.items() if times > 1], "asked twice"),
        )
        if ids
    ]
    if problems:
        raise DataError(f"the answers do not fit the {len(items)} items: " + "; ".join(problems))
    return [(item, found[item.id]) for item in items if item.id not in failed]


def some(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f", ... {len(names) - 8} more" if len(names) > 8 else "")
