"""The embedded scenes: existence, pairs, positions, attributes, digits and captions about the same rendered images.

Each task is scored by the kind of its benchmark: existence as POPE, pairs of a yes and a no as MME, where an object is
as localisation, captions as CHAIR, the rest by exact match. The rules are the same in every world of scenes. Results
say something about the embedded models only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from vlmattn.errors import DataError, nearest
from vlmattn.eval.benchmarks import chair, exact, localisation, mme, pope
from vlmattn.eval.tally import Aggregate, Kind, Scorer
from vlmattn.scenes.world import NUM_TYPES, WORLD_2, WORLDS, World, type_name

DEFAULT_WORLD = WORLD_2.name
"""The world that models are asked about of which nothing else is known."""
TASK_NAMES = {
    "random": "is it there (any absent object)",
    "popular": "is it there (frequent absent objects)",
    "adversarial": "is it there (absent partners)",
    "binding": "is it there (right colour or shape elsewhere)",
    "color": "which colour",
    "shape": "which shape",
    "cell": "what is in a place",
    "next": "what is in the place beside an object",
    "count": "how many",
    "digits": "read the digits",
    "rel": "left or right, above or below",
    "loc": "where an object is",
    "pairs": "one that is there, one that is not",
    "pair-color": "its colour and another one",
    "pair-place": "its place and another one",
    "pair-rel": "its side of another object and the other side",
    "caption": "describe the image",
}
"""Every task in words."""
ALL_TASKS = tuple(TASK_NAMES)
NOT_BY_DEFAULT = ("binding", "rel")
"""Tasks that are asked only where they are named."""
YES_NO = ("random", "popular", "adversarial", "binding")
EXACT = ("color", "shape", "cell", "next", "count", "digits", "rel")
PAIRS = ("pairs", "pair-color", "pair-place", "pair-rel")
PROFILES = tuple(pope.PROFILES)
"""How yes/no answers are read; everything else has one reading."""


def places(world: World) -> dict[str, localisation.Box]:
    """Name of each place of a world -> its rectangle as shares of the image's width and height."""
    rows_and_columns = map(world.place, range(world.cells))
    return {
        name: (column / world.grid, row / world.grid, (column + 1) / world.grid, (row + 1) / world.grid)
        for name, (row, column) in zip(world.cell_names, rows_and_columns, strict=True)
    }


PLACES = {name: box for world in WORLDS.values() for name, box in places(world).items()}
"""The places of all worlds; a name means the same rectangle in each that has it."""
AGGREGATES = (
    Aggregate("mean_accuracy", "yes/no accuracy", "yes_no", "accuracy", groups=pope.CATEGORIES),
    Aggregate("mean_f1", "yes/no F1", "yes_no", "f1", groups=pope.CATEGORIES),
    Aggregate("mean_exact", "exact match", "exact", "accuracy"),
    Aggregate("mean_pairs", "pairs acc + acc+", "pairs", "score"),
)
"""Means over random, popular and adversarial, and over the exact-match and the pair tasks that were asked."""
HEADLINES = (
    *(aggregate.name for aggregate in AGGREGATES),
    "loc.hit",
    "caption.chair_s",
    "caption.chair_i",
    "caption.recall",
)

TASK_GROUPS = {
    "mean_accuracy": "existence",
    "color.accuracy": "colour",
    "count.accuracy": "count",
    "loc.hit": "localisation",
    "digits.accuracy": "reading",
}
"""What a comparison of pruners shows: one number a group of tasks."""


@cache
def world_words() -> chair.Words:
    """The word table of the rendered world: its object types, each a colour and a shape."""
    names = [type_name(index) for index in range(NUM_TYPES)]
    return chair.Words.of({"classes": {name: [] for name in names}, "word_pairs": {name: name for name in names}})


def check_world(world: str) -> str:
    """The name, if it is that of a world of scenes.

    Raises:
        DataError: it is not.
    """
    if world not in WORLDS:
        raise DataError(f"world {world!r} of the scenes is unknown; {nearest(world, WORLDS)}")
    return world


def in_splits(task: str) -> str:
    """What `vlmattn.scenes.benchmark` calls a task."""
    return f"exist-{task}" if task in YES_NO else task


def chosen(tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The tasks to ask, in the order of `ALL_TASKS`, so that the order of writing changes nothing.

    Args:
        tasks: names; None for all but `NOT_BY_DEFAULT`.

    Raises:
        DataError: an unknown task, or none at all.
    """
    wanted = tuple(task for task in ALL_TASKS if task not in NOT_BY_DEFAULT) if tasks is None else tuple(tasks)
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
        **dict.fromkeys(PAIRS, pairs),
        "loc": place,
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
        tasks=TASK_GROUPS,
    )
