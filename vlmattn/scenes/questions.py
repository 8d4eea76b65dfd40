"""Questions and answers about a scene, in plain English.

Tasks: existence (``exist-yes`` and the negatives ``exist-random``, ``exist-popular``, ``exist-adversarial``,
``exist-binding``), ``color``, ``shape``, ``cell`` (what is at a place), ``loc`` (where is an object), ``rel``
(left/right/above/below), ``count``, ``digits`` and ``caption``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .text import NUMBER_NAMES, SHAPE_PLURALS, article
from .world import (
    CELL_NAMES,
    COLOR_NAMES,
    GRID,
    NUM_TYPES,
    PARTNER,
    POPULARITY,
    SHAPE_NAMES,
    Scene,
    SceneObject,
    absent_partners,
    type_color,
    type_name,
    type_shape,
)

ABSENT = GRID * GRID
"""Label of a mentioned object that is not in the scene."""
POPULAR_POOL = 8
"""Popular negatives come from that many most frequent absent types."""
CAPTION_REQUEST = "Describe the image."
EXISTENCE_TASKS = ("exist-random", "exist-popular", "exist-adversarial", "exist-binding")
OTHER_TASKS = ("color", "shape", "cell", "loc", "rel", "count", "digits", "caption")


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        task: name of the task.
        text: the question.
        answer: the expected answer, lower case.
        mentions: (name of an object in the question, its cell or ABSENT), for the auxiliary loss.
    """

    task: str
    text: str
    answer: str
    mentions: tuple[tuple[str, int], ...] = ()


def existence(kind: int) -> str:
    """The existence question about an object type, in POPE's wording."""
    return f"Is there {article(type_name(kind))} in the image?"


def _pick(rng: np.random.RandomState, items: Sequence[int]) -> int:
    return int(items[rng.randint(len(items))])


def negatives(rng: np.random.RandomState, scene: Scene, category: str, count: int = 1) -> list[int]:
    """Distinct absent types for existence questions whose answer is no.

    Args:
        rng: the source of randomness; it is advanced.
        scene: the scene asked about.
        category: ``random`` (any absent type), ``popular`` (one of the 8 most frequent absent types), ``adversarial``
        (the
            absent partner of a present object), ``binding`` (shares exactly its colour or its shape with a present
            object) or ``frequency`` (by popularity; training only).
        count: how many; fewer are returned where the scene offers fewer.

    Raises:
        ValueError: unknown category.
    """
    present = set(scene.types)
    absent = [kind for kind in range(NUM_TYPES) if kind not in present]
    weights: np.ndarray | None = None
    if category == "random":
        pool = absent
    elif category == "popular":
        pool = sorted(absent, key=lambda kind: -POPULARITY[kind])[:POPULAR_POOL]
    elif category == "adversarial":
        pool = absent_partners(scene)
    elif category == "binding":
        pool = [kind for kind in absent if any(_shares_one_feature(kind, other) for other in present)]
    elif category == "frequency":
        pool = absent
        weights = POPULARITY[absent] / POPULARITY[absent].sum()
    else:
        raise ValueError(f"category={category!r}; expected random, popular, adversarial, binding or frequency")
    if not pool:
        return []
    return [int(kind) for kind in rng.choice(pool, size=min(count, len(pool)), replace=False, p=weights)]


def _shares_one_feature(first: int, second: int) -> bool:
    return (type_color(first) == type_color(second)) != (type_shape(first) == type_shape(second))


def _ask_yes(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    return Question("exist-yes", existence(item.type), "yes", ((item.name, item.cell),))


def _ask_location(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    return Question("loc", f"Where is the {item.name}?", CELL_NAMES[item.cell], ((item.name, item.cell),))


def _ask_cell(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """70 % about an object; otherwise the plate (30 % of the rest) or an empty cell."""
    cell, answer = item.cell, item.name
    if rng.random_sample() >= 0.7:
        if scene.plate is not None and rng.random_sample() < 0.3:
            cell, answer = scene.plate.cell, "digits"
        else:
            cell, answer = _pick(rng, scene.empty_cells()), "nothing"
    return Question("cell", f"What is in the {CELL_NAMES[cell]}?", answer)


def _ask_color(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """About a shape that occurs once; None where there is none."""
    shapes = [other.shape for other in scene.objects]
    unique = [other for other in scene.objects if shapes.count(other.shape) == 1]
    if not unique:
        return None
    chosen = unique[rng.randint(len(unique))]
    return Question("color", f"What color is the {chosen.shape}?", chosen.color, ((chosen.shape, chosen.cell),))


def _ask_shape(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """About a colour that occurs once; None where there is none."""
    colors = [other.color for other in scene.objects]
    unique = [other for other in scene.objects if colors.count(other.color) == 1]
    if not unique:
        return None
    chosen = unique[rng.randint(len(unique))]
    mention = (f"{chosen.color} object", chosen.cell)
    return Question("shape", f"What shape is the {chosen.color} object?", chosen.shape, (mention,))


def _ask_count(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """All objects, those of one colour or those of one shape; colour and shape are mostly ones that occur."""
    what = rng.randint(3)
    occurs = rng.random_sample() < 0.7
    if what == 0:
        return Question("count", "How many objects are there?", NUMBER_NAMES[len(scene.objects)])
    if what == 1:
        color = item.color if occurs else COLOR_NAMES[rng.randint(len(COLOR_NAMES))]
        number = sum(other.color == color for other in scene.objects)
        return Question("count", f"How many {color} objects are there?", NUMBER_NAMES[number])
    shape = item.shape if occurs else SHAPE_NAMES[rng.randint(len(SHAPE_NAMES))]
    number = sum(other.shape == shape for other in scene.objects)
    return Question("count", f"How many {SHAPE_PLURALS[shape]} are there?", NUMBER_NAMES[number])


def _ask_relation(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """Two objects along an axis on which they differ; None for a single object."""
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[int(i)] for i in rng.choice(len(scene.objects), size=2, replace=False))
    across = first.cell % GRID - second.cell % GRID
    down = first.cell // GRID - second.cell // GRID
    mentions = ((first.name, first.cell), (second.name, second.cell))
    if across and (not down or rng.random_sample() < 0.5):
        text = f"Is the {first.name} left or right of the {second.name}?"
        return Question("rel", text, "left" if across < 0 else "right", mentions)
    text = f"Is the {first.name} above or below the {second.name}?"
    return Question("rel", text, "above" if down < 0 else "below", mentions)


def _ask_digits(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    answer = "none" if scene.plate is None else "{} {}".format(*scene.plate.digits)
    return Question("digits", "What digits are shown?", answer)


def caption(scene: Scene) -> str:
    """The reference caption: most popular type first, each partner right after its anchor.

    This order is where the language prior lives: after an anchor the partner is nearly always the next object.
    """
    order: list[int] = []
    for kind in sorted(scene.types, key=lambda kind: -POPULARITY[kind]):
        for name in (kind, int(PARTNER[kind])):
            if name in scene.types and name not in order:
                order.append(name)
    return ", ".join(article(type_name(kind)) for kind in order) + "."


def _ask_caption(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    return Question("caption", CAPTION_REQUEST, caption(scene))


_ASK: dict[str, Callable[[np.random.RandomState, Scene, SceneObject], Question | None]] = {
    "exist-yes": _ask_yes,
    "loc": _ask_location,
    "cell": _ask_cell,
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "rel": _ask_relation,
    "digits": _ask_digits,
    "caption": _ask_caption,
}


def ask(rng: np.random.RandomState, scene: Scene, task: str, index: int | None = None) -> Question | None:
    """One question of a task.

    Args:
        rng: the source of randomness; it is advanced.
        scene: the scene asked about.
        task: ``exist-<category>`` for a negative, else a name in this module's docstring.
        index: the object to ask about, modulo their number, where the task is about one object; None draws it.

    Returns:
        The question, or None where the scene cannot carry one of this task.

    Raises:
        ValueError: unknown task.
    """
    item = scene.objects[int(rng.randint(len(scene.objects))) if index is None else index % len(scene.objects)]
    if task in _ASK:
        return _ASK[task](rng, scene, item)
    if not task.startswith("exist-"):
        raise ValueError(f"task={task!r}; expected one of {', '.join(_ASK)} or exist-<category>")
    kinds = negatives(rng, scene, task.removeprefix("exist-"))
    if not kinds:
        return None
    return Question(task, existence(kinds[0]), "no", ((type_name(kinds[0]), ABSENT),))
