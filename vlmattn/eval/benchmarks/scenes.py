"""The embedded scenes: existence, pairs, positions, attributes, digits and captions about the same rendered images.

Each task is scored by the kind of its benchmark: existence as POPE, pairs as MME, where an object is as localisation,
captions as CHAIR, the rest by exact match. Results say something about the embedded models only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from vlmattn.errors import DataError, nearest
from vlmattn.eval.benchmarks import chair, exact, localisation, mme, pope
from vlmattn.eval.tally import Aggregate, Kind, Scorer
from vlmattn.scenes.world import NUM_TYPES, WORLD_1, type_name

TASKS = ("random", "popular", "adversarial", "color", "shape", "cell", "count", "digits", "loc", "pairs", "caption")
"""What is asked by default, in this order."""
TASK_NAMES = {
    "random": "is it there (any absent object)",
    "popular": "is it there (frequent absent objects)",
    "adversarial": "is it there (absent partners)",
    "binding": "is it there (right colour or shape elsewhere)",
    "color": "which colour",
    "shape": "which shape",
    "cell": "what is in a place",
    "count": "how many",
    "digits": "read the digits",
    "rel": "left or right, above or below",
    "loc": "where an object is",
    "pairs": "one that is there, one that is not",
    "caption": "describe the image",
}
"""Every task in words."""
ALL_TASKS = tuple(TASK_NAMES)
YES_NO = ("random", "popular", "adversarial", "binding")
EXACT = ("color", "shape", "cell", "count", "digits", "rel")
PROFILES = tuple(pope.PROFILES)
"""How yes/no answers are read; everything else has one reading."""
PLACES: dict[str, localisation.Box] = {
    name: (column / WORLD_1.grid, row / WORLD_1.grid, (column + 1) / WORLD_1.grid, (row + 1) / WORLD_1.grid)
    for name, (row, column) in zip(WORLD_1.cell_names, map(WORLD_1.place, range(WORLD_1.cells)), strict=True)
}
"""Name of a place -> its rectangle as shares of the image."""
AGGREGATES = (
    Aggregate("mean_accuracy", "yes/no accuracy", "yes_no", "accuracy", groups=pope.CATEGORIES),
    Aggregate("mean_f1", "yes/no F1", "yes_no", "f1", groups=pope.CATEGORIES),
    Aggregate("mean_exact", "exact match", "exact", "accuracy"),
)
"""Means over random, popular and adversarial, and over the exact-match tasks that were asked."""
HEADLINES = (
    *(aggregate.name for aggregate in AGGREGATES),
    "loc.hit",
    "pairs.score",
    "caption.chair_s",
    "caption.chair_i",
    "caption.recall",
)


@cache
def world_words() -> chair.Words:
    """The word table of the rendered world: its object types, each a colour and a shape."""
    names = [type_name(index) for index in range(NUM_TYPES)]
    return chair.Words.of({"classes": {name: [] for name in names}, "word_pairs": {name: name for name in names}})


def chosen(tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The tasks to ask, in the order of `ALL_TASKS`, so that the order of writing changes nothing; None: `TASKS`.

    Raises:
        DataError: an unknown task, or none at all.
    """
    wanted = TASKS if tasks is None else tuple(tasks)
    for task in wanted:
        if task not in ALL_TASKS:
            raise DataError(f"task {task!r} is unknown; {nearest(task, ALL_TASKS)}")
    if not wanted:
        raise DataError(f"no tasks to ask; expected some of {', '.join(ALL_TASKS)}")
    return tuple(task for task in ALL_TASKS if task in wanted)


def scorer(profile: str = "official", words: str | Path | None = None) -> Scorer:
    """The numbers of all tasks.

    Args:
        profile: how yes/no answers are read, singly (`pope`) and in pairs (`mme`).
        words: path of a word table for captions; None: the world's own.

    Raises:
        DataError: an unknown profile, or a word table that cannot be read.
    """
    yes_no, pairs, place = pope.kind(profile), mme.kind(profile), localisation.place_kind(PLACES)
    caption = chair.kind(world_words() if words is None else chair.Words.read(words), "plain")
    kinds = {
        **dict.fromkeys(YES_NO, yes_no),
        **dict.fromkeys(EXACT, exact.KIND),
        "loc": place,
        "pairs": pairs,
        "caption": caption,
    }

    def kind(group: str) -> Kind:
        if group not in kinds:
            raise DataError(f"{group!r} is not a task of the scenes; {nearest(group, kinds)}")
        return kinds[group]

    return Scorer(
        name="scenes",
        profile=profile,
        kind=kind,
        aggregates=AGGREGATES,
        headlines=HEADLINES,
        words="" if words is None else str(Path(words).resolve()),
    )
