"""Questions and answers about a scene, in plain English.

Tasks: existence (``exist-yes`` and the negatives ``exist-random``, ``exist-popular``, ``exist-adversarial``,
``exist-binding``), ``color``, ``shape``, ``cell`` (what is at a place), ``loc`` (where is an object), ``rel``
(left/right/above/below), ``count``, ``digits``, ``caption``, ``next`` (what is in the cell beside an object) and, as in
MME, pairs of a question whose answer is yes and one whose answer is no: ``pair-color``, ``pair-place`` and
``pair-rel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .text import NUMBER_NAMES, SHAPE_PLURALS, article
from .world import (
    COLOR_NAMES,
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

POPULAR_POOL = 8
"""Popular negatives come from that many most frequent absent types."""
CAPTION_REQUEST = "Describe the image."
EXISTENCE_TASKS = ("exist-random", "exist-popular", "exist-adversarial", "exist-binding")
OTHER_TASKS = ("color", "shape", "cell", "loc", "rel", "count", "digits", "caption", "next")
PAIR_TASKS = ("pair-color", "pair-place", "pair-rel")
_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Rows and columns from an object to the cell beside it."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        task: name of the task.
        text: the question.
        answer: the expected answer, lower case.
        mentions: (name of an object in the question, its cell or the number of cells where it is absent), for the
            auxiliary loss.
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
    return Question("loc", f"Where is the {item.name}?", scene.world.cell_names[item.cell], ((item.name, item.cell),))


def _ask_cell(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """70 % about an object; otherwise the first plate (30 % of the rest) or an empty cell."""
    cell = item.cell
    if rng.random_sample() >= 0.7:
        if scene.plates and rng.random_sample() < 0.3:
            cell = scene.plates[0].cell
        else:
            cell = _pick(rng, scene.empty_cells())
    return Question("cell", f"What is in the {scene.world.cell_names[cell]}?", scene.content(cell))


def _ask_next(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """About a cell beside an object, in 70 % of the cases one that holds something if there is one."""
    row, column = scene.world.place(item.cell)
    answers = {}
    for word, (down, right) in _BESIDE.items():
        if 0 <= row + down < scene.world.grid and 0 <= column + right < scene.world.grid:
            answers[word] = scene.content(item.cell + down * scene.world.grid + right)
    words = [word for word, answer in answers.items() if answer != "nothing"]
    if not words or rng.random_sample() >= 0.7:
        words = list(answers)
    word = words[rng.randint(len(words))]
    return Question("next", f"What is just {word} the {item.name}?", answers[word], ((item.name, item.cell),))


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
    (row, column), (other_row, other_column) = (scene.world.place(item.cell) for item in (first, second))
    across, down = column - other_column, row - other_row
    mentions = ((first.name, first.cell), (second.name, second.cell))
    if across and (not down or rng.random_sample() < 0.5):
        text = f"Is the {first.name} left or right of the {second.name}?"
        return Question("rel", text, "left" if across < 0 else "right", mentions)
    text = f"Is the {first.name} above or below the {second.name}?"
    return Question("rel", text, "above" if down < 0 else "below", mentions)


def _ask_digits(rng: np.random.RandomState, scene: Scene, item: SceneObject) -> Question | None:
    """With several plates the question names the place of one."""
    if len(scene.plates) > 1:
        return _ask_digits_at(scene, scene.plates[rng.randint(len(scene.plates))].cell)
    return _ask_digits_anywhere(scene)


def _ask_digits_anywhere(scene: Scene) -> Question:
    return Question("digits", "What digits are shown?", scene.plates[0].text if scene.plates else "none")


def _ask_digits_at(scene: Scene, cell: int) -> Question:
    shown = [plate.text for plate in scene.plates if plate.cell == cell]
    return Question("digits", f"What digits are in the {scene.world.cell_names[cell]}?", shown[0] if shown else "none")


def _read_plate(rng: np.random.RandomState, scene: Scene, index: int) -> Question:
    """About a certain plate; beyond the last one about a place without digits.

    A model that is asked for one plate of two at random learns to read first and to choose late, if at all; asked for
    each of them in the same picture, it has to choose. Of a single plate the question mostly names no place.
    """
    if index < len(scene.plates):
        if len(scene.plates) == 1 and rng.random_sample() < 0.6:
            return _ask_digits_anywhere(scene)
        return _ask_digits_at(scene, scene.plates[index].cell)
    if not scene.plates:
        return _ask_digits_anywhere(scene)
    taken = [plate.cell for plate in scene.plates]
    return _ask_digits_at(scene, _pick(rng, [cell for cell in range(scene.world.cells) if cell not in taken]))


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
    "next": _ask_next,
}


def _pair_color(rng: np.random.RandomState, scene: Scene) -> tuple[Question, Question] | None:
    """As the task ``color``; the wrong colour is half of the time that of another object."""
    asked = _ask_color(rng, scene, scene.objects[0])
    if asked is None:
        return None
    shape = asked.mentions[0][0]
    others = [item.color for item in scene.objects if item.color != asked.answer]
    if not others or rng.random_sample() < 0.5:
        others = [color for color in COLOR_NAMES if color != asked.answer]
    wrong = others[rng.randint(len(others))]
    return _yes_no("pair-color", f"Is the {shape} {{}}?", asked.answer, wrong, asked.mentions)


def _pair_place(rng: np.random.RandomState, scene: Scene) -> tuple[Question, Question] | None:
    item = scene.objects[rng.randint(len(scene.objects))]
    elsewhere = (item.cell + 1 + rng.randint(scene.world.cells - 1)) % scene.world.cells
    right, wrong = (scene.world.cell_names[cell] for cell in (item.cell, elsewhere))
    return _yes_no("pair-place", f"Is the {item.name} in the {{}}?", right, wrong, ((item.name, item.cell),))


def _pair_relation(rng: np.random.RandomState, scene: Scene) -> tuple[Question, Question] | None:
    asked = _ask_relation(rng, scene, scene.objects[0])
    if asked is None:
        return None
    first, second = (name for name, _ in asked.mentions)
    words = ("left of", "right of") if asked.answer in ("left", "right") else ("above", "below")
    right, wrong = words if words[0].startswith(asked.answer) else words[::-1]
    return _yes_no("pair-rel", f"Is the {first} {{}} the {second}?", right, wrong, asked.mentions)


def _yes_no(
    task: str, text: str, right: str, wrong: str, mentions: tuple[tuple[str, int], ...]
) -> tuple[Question, Question]:
    """A question with its right and with a wrong filling."""
    return Question(task, text.format(right), "yes", mentions), Question(task, text.format(wrong), "no", mentions)


_PAIR = {"pair-color": _pair_color, "pair-place": _pair_place, "pair-rel": _pair_relation}


def ask_pair(rng: np.random.RandomState, scene: Scene, task: str) -> tuple[Question, Question] | None:
    """A question whose answer is yes and one whose answer is no, or None where the scene cannot carry them.

    Args:
        rng: the source of randomness; it is advanced.
        scene: the scene asked about.
        task: a name in PAIR_TASKS.
    """
    return _PAIR[task](rng, scene)


def ask(rng: np.random.RandomState, scene: Scene, task: str, index: int | None = None) -> Question | None:
    """One question of a task.

    Args:
        rng: the source of randomness; it is advanced.
        scene: the scene asked about.
        task: ``exist-<category>`` for a negative, else a name in this module's docstring; of a pair one is drawn.
        index: the object to ask about, modulo their number, where the task is about one object, and for ``digits``
            the plate, beyond the last one a place without digits; None draws it.

    Returns:
        The question, or None where the scene cannot carry one of this task.

    Raises:
        ValueError: unknown task.
    """
    if task == "digits" and index is not None:
        return _read_plate(rng, scene, index)
    item = scene.objects[int(rng.randint(len(scene.objects))) if index is None else index % len(scene.objects)]
    if task in _ASK:
        return _ASK[task](rng, scene, item)
    if task in PAIR_TASKS:
        pair = ask_pair(rng, scene, task)
        return pair and pair[rng.randint(2)]
    if not task.startswith("exist-"):
        raise ValueError(f"task={task!r}; expected one of {', '.join([*_ASK, *_PAIR])} or exist-<category>")
    kinds = negatives(rng, scene, task.removeprefix("exist-"))
    if not kinds:
        return None
    return Question(task, existence(kinds[0]), "no", ((type_name(kinds[0]), scene.world.cells),))
