"""Answers that changed from right to wrong and back, for a page: counts, and examples with the tokens kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlmattn.eval import page
from vlmattn.eval.compare import Flip
from vlmattn.eval.records import kept_tokens
from vlmattn.eval.runs import Run

if TYPE_CHECKING:
    from PIL.Image import Image

OpenImage = Callable[[str], "Image"]
ARROW = "\u2192"
_SIDE = 240
_LONGEST = 600


@dataclass(frozen=True)
class Side:
    """A run against the run it is compared with.

    Attributes:
        label: what the page calls the run.
        first, second: the run compared with, and the run.
        flips: answers that changed from right to wrong or back, in the order of the benchmark.
    """

    label: str
    first: Run = field(repr=False)
    second: Run = field(repr=False)
    flips: Sequence[Flip] = field(repr=False)

    @cached_property
    def records(self) -> tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]:
        """Id -> record, of the first and of the second run."""
        first, second = ({record["id"]: record for record in run.records} for run in (self.first, self.second))
        return first, second


def sections(sides: Sequence[Side], open_image: OpenImage, examples: int) -> list[page.Section]:
    """What a page says about changed answers; nothing without sides.

    Args:
        sides: runs, all against the same one.
        open_image: name of an image -> the image; raises OSError, ValueError or SyntaxError where it cannot.
        examples: how many are shown with their pictures.
    """
    if not sides:
        return []
    total = sum(len(side.flips) for side in sides)
    if not total:
        return [page.Prose("Changed answers", ["No answer changed from right to wrong or back."])]
    shown = [example(side, flip, open_image) for side, flip in pick(sides, examples)]
    how = (
        f"{len(shown)} of {total}, spread evenly over methods, tasks and directions; of each kind the first in the "
        "order of the benchmark. They show what changes, not how often it does: the counts above say that. Kept tokens "
        "are bright with an orange edge, dropped ones dim."
    )
    gallery = [page.Gallery("Examples of changed answers", shown, [how])] if shown else []
    return [table(sides), *gallery]


def table(sides: Sequence[Side]) -> page.Table:
    """How many answers changed: by direction, by what became of yes and no, and by task where some did."""
    turns = [Counter((flip.first_verdict, flip.second_verdict) for flip in side.flips) for side in sides]
    answers = [turn for turn in (("yes", "no"), ("no", "yes")) if any(count[turn] for count in turns)]
    there = {flip.group for side in sides for flip in side.flips}
    groups = [group for group in dict.fromkeys(item.group for item in sides[0].first.items) if group in there]
    columns = [
        page.Column("method", number=False, code=True),
        page.Column("lost", "right to wrong"),
        page.Column("won", "wrong to right"),
        *(page.Column(f"{before} {ARROW} {after}", "lost + won") for before, after in answers),
        *(page.Column(group, "lost + won") for group in groups),
    ]
    body = []
    for side in sides:
        ways = Counter(flip.direction for flip in side.flips)
        cells = [page.Cell(str(ways[way]), value=ways[way]) for way in ("lost", "won")]
        for turn in answers:
            cells.append(_both(flip for flip in side.flips if (flip.first_verdict, flip.second_verdict) == turn))
        cells += [_both(flip for flip in side.flips if flip.group == group) for group in groups]
        body.append(page.Row([page.Cell(side.label, value=side.label), *cells]))
    notes = [
        f"Question by question against {sides[0].first.label}: \u201c12 + 3\u201d means that 12 right answers became "
        "wrong and 3 wrong ones right. Those columns sort by the sum."
    ]
    return page.Table("Changed answers", columns, body, notes=notes)


def pick(sides: Sequence[Side], count: int) -> list[tuple[Side, Flip]]:
    """`count` flips, spread evenly over sides, tasks and directions; a question comes twice only if no other is left.

    Of one side, task and direction the order is that of the benchmark: equal runs give equal picks.
    """
    waiting: dict[tuple[int, str, str], list[Flip]] = {}
    for number, side in enumerate(sides):
        for flip in side.flips:
            waiting.setdefault((number, flip.group, flip.direction), []).append(flip)
    used: Counter[Any] = Counter()
    chosen: list[tuple[Side, Flip]] = []
    while len(chosen) < count and any(waiting.values()):
        options = []
        for rank, (kind, flips) in enumerate(waiting.items()):
            if flips:
                place = next((place for place, flip in enumerate(flips) if not used["id", flip.id]), 0)
                again = used["id", flips[place].id] > 0
                parts = sum(used[part] for part in enumerate(kind))
                options.append((again, used[kind], parts, rank, kind, place))
        *_, kind, place = min(options)
        flip = waiting[kind].pop(place)
        used.update([kind, *enumerate(kind), ("id", flip.id)])
        chosen.append((sides[kind[0]], flip))
    return chosen


def example(side: Side, flip: Flip, open_image: OpenImage) -> page.Example:
    """A flip with its image and the tokens that each run kept; says so where the image is gone."""
    first, second = side.first.label, side.label
    shown: list[page.Picture] = []
    missing = ""
    try:
        seen = [(label, records[flip.id]) for label, records in zip((first, second), side.records, strict=True)]
        shown = pictures(open_image(flip.image), flip.image, seen)
    except (OSError, ValueError, SyntaxError) as error:
        missing = f"The image {flip.image} cannot be shown: {error}"
    return page.Example(
        question=clipped(flip.question),
        expected=clipped(flip.label),
        answers=[
            page.Answer(first, clipped(flip.first_text.strip()), flip.direction == "lost"),
            page.Answer(second, clipped(flip.second_text.strip()), flip.direction == "won"),
        ],
        pictures=shown,
        task=flip.group,
        missing=missing,
    )


def pictures(image: Image, name: str, seen: Iterable[tuple[str, Mapping[str, Any]]]) -> list[page.Picture]:
    """The image, and the tokens that runs kept of it, a picture for each pruning stage.

    Args:
        image: what the model was shown.
        name: of the image.
        seen: (label of a run, its record of the question); records without `kept` have no picture.

    Raises:
        ValueError: the image has another size than the one that a run saw.
    """
    from vlmattn.spans import Geometry
    from vlmattn.viz import overlay

    found = [page.Picture([f"image {name}"], overlay.fit(image, _SIDE))]
    for label, record in seen:
        if not record.get("kept") or "geometry" not in record:
            continue
        geometry = Geometry.from_dict(record["geometry"])
        if geometry.size != image.size:
            width, height = geometry.size
            raise ValueError(f"it has {image.width} x {image.height} pixels, the model saw {width} x {height}")
        pruned = [(stage["method"], stage["before_layer"], kept_tokens(stage)) for stage in record["kept"]]
        for title, picture in overlay.stage_panels(image, geometry, pruned, _SIDE)[1:]:
            method, where = title.split("\n")
            found.append(page.Picture([label, *([method] if len(pruned) > 1 else []), where], picture))
    return found


def clipped(text: str) -> str:
    """The text, or its beginning and how much is left out."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text) - _LONGEST} more characters)"


def _both(flips: Iterable[Flip]) -> page.Cell:
    ways = Counter(flip.direction for flip in flips)
    total = ways["lost"] + ways["won"]
    return page.Cell(f"{ways['lost']} + {ways['won']}" if total else "0", value=total)
