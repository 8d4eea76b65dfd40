"""Questions about prompts with several pictures.

Tasks of both kinds ask about one of the two scenes by its name ("the second image", "frame four"). ``loc``, ``cell``,
``next``, ``color``, ``shape``, ``count``, ``rel`` and ``digits`` are those of a single picture; ``changed`` asks what
is at a place whose content differs between the scenes, and ``exist`` whether an object is there. Two images also have
``same`` and ``which`` (in what image an object is), videos ``moved``, ``direction`` and ``still``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .questions import Question, ask, existence
from .several import Images, Prompt, Video
from .text import article
from .world import NUM_TYPES, Scene, type_name

SINGLE_TASKS = ("loc", "cell", "next", "color", "shape", "count", "rel", "digits")
"""Tasks of a single picture that name one of the two scenes here."""
SHARED_TASKS = ("changed", "exist", *SINGLE_TASKS)
IMAGES_TASKS = ("same", "which", *SHARED_TASKS)
VIDEO_TASKS = ("moved", "direction", "still", *SHARED_TASKS)
YES_NO_TASKS = ("same", "exist", "still")
"""Tasks whose answer is yes or no."""
ABOUT_THE_CHANGE = 0.7
"""Probability that a question about an object is about one that the two scenes do not share, where there is one."""

_Item = TypeVar("_Item")


def _pick(rng: np.random.RandomState, preferred: list[_Item], others: list[_Item]) -> _Item:
    """One of ``preferred`` with probability ABOUT_THE_CHANGE, else one of ``others``; always of the one not empty."""
    chosen = preferred if preferred and (not others or rng.random_sample() < ABOUT_THE_CHANGE) else others
    return chosen[rng.randint(len(chosen))]


def _agreed(prompt: Prompt, question: Question) -> Question:
    """The question without the mentions that are not true of both scenes: an object's name comes before the scene's."""
    places = [{item.name: item.cell for item in scene.objects} for scene in prompt.scenes]
    absent = prompt.scenes[0].world.cells
    kept = [(name, cell) for name, cell in question.mentions if all(at.get(name, absent) == cell for at in places)]
    return replace(question, mentions=tuple(kept))


def _mention(scene: Scene, kind: int) -> tuple[tuple[str, int], ...]:
    """An object type with its cell, or the number of cells if it is absent, as mentions of a question."""
    cells = [item.cell for item in scene.objects if item.type == kind]
    return ((type_name(kind), cells[0] if cells else scene.world.cells),)


def _about(prompt: Prompt, view: int, question: Question) -> Question:
    """A question about a picture as one about the scene number ``view``."""
    name = prompt.views[view]
    if question.text.endswith(tuple(f"in the {cell}?" for cell in prompt.scenes[view].world.cell_names)):
        text = f"{question.text[:-1]} of {name}?"
    else:
        text = f"{question.text[:-1]} in {name}?"
    return _agreed(prompt, replace(question, text=text))


def _ask_single(rng: np.random.RandomState, prompt: Prompt, task: str, turn: int) -> Question | None:
    """A task of a single picture, mostly about an object that the other scene does not have in the same place."""
    view = turn % 2
    scene, other = prompt.scenes[view], prompt.scenes[1 - view]
    order = list(range(len(scene.objects)))
    differing = [index for index in order if scene.objects[index] not in other.objects]
    if task == "digits" and not scene.plates:
        return None
    question = ask(rng, scene, task, None if task == "digits" else _pick(rng, differing, order))
    return question and _about(prompt, view, question)


def _ask_changed(rng: np.random.RandomState, prompt: Prompt, turn: int) -> Question | None:
    """None where nothing differs."""
    first, second = prompt.scenes
    cells = [cell for cell in range(first.world.cells) if first.content(cell) != second.content(cell)]
    if not cells:
        return None
    cell, view = cells[rng.randint(len(cells))], turn % 2
    text = f"What is in the {first.world.cell_names[cell]}?"
    return _about(prompt, view, Question("changed", text, prompt.scenes[view].content(cell)))


def _only_in(scene: Scene, other: Scene) -> list[int]:
    return [kind for kind in scene.types if kind not in other.types]


def _absent(prompt: Prompt) -> list[int]:
    """Types of which neither scene has an object."""
    present = {kind for scene in prompt.scenes for kind in scene.types}
    return [kind for kind in range(NUM_TYPES) if kind not in present]


def _ask_existence(rng: np.random.RandomState, prompt: Prompt, turn: int) -> Question | None:
    """Yes and no in turn; of both the object is mostly one that one of the scenes has and the other does not."""
    view, is_there = int(rng.randint(2)), turn % 2 == 0
    scene, other = prompt.scenes[view], prompt.scenes[1 - view]
    if is_there:
        kind = _pick(rng, _only_in(scene, other), list(scene.types))
    else:
        kind = _pick(rng, _only_in(other, scene), _absent(prompt))
    text = existence(kind).replace("the image", prompt.views[view])
    return _agreed(prompt, Question("exist", text, "yes" if is_there else "no", _mention(scene, kind)))


def _ask_same(rng: np.random.RandomState, prompt: Images, turn: int) -> Question:
    """Yes or no as the prompt is."""
    return Question("same", "Are the two images the same?", "no" if prompt.change else "yes")


def _ask_which(rng: np.random.RandomState, prompt: Images, turn: int) -> Question:
    """In the first, in the second, in both or in none; mostly about an object of one image where there is one."""
    first, second = prompt.scenes
    answers = {kind: "first" for kind in _only_in(first, second)}
    answers |= {kind: "second" for kind in _only_in(second, first)}
    both = [kind for kind in first.types if kind in second.types]
    elsewhere = both if both and rng.randint(2) else _absent(prompt)
    kind = _pick(rng, list(answers), elsewhere)
    answer = answers.get(kind, "first and second" if kind in both else "none")
    text = f"In what image is there {article(type_name(kind))}?"
    return _agreed(prompt, Question("which", text, answer, _mention(first, kind)))


def _ask_moved(rng: np.random.RandomState, prompt: Video, turn: int) -> Question:
    return Question("moved", "What moved in the video?", prompt.scene.objects[prompt.mover].name)


def _ask_direction(rng: np.random.RandomState, prompt: Video, turn: int) -> Question:
    name = prompt.scene.objects[prompt.mover].name
    return Question("direction", f"Is the {name} moved left, right, up or down?", prompt.direction)


def _ask_still(rng: np.random.RandomState, prompt: Video, turn: int) -> Question:
    objects, mover = prompt.scene.objects, prompt.scene.objects[prompt.mover]
    others = [item for item in objects if item is not mover]
    item, answer = (mover, "no") if turn % 2 else (others[rng.randint(len(others))], "yes")
    return _agreed(prompt, Question("still", f"Is the {item.name} still?", answer, ((item.name, item.cell),)))


_ASK: dict[str, Callable[[np.random.RandomState, Any, int], Question | None]] = {
    "changed": _ask_changed,
    "exist": _ask_existence,
    "same": _ask_same,
    "which": _ask_which,
    "moved": _ask_moved,
    "direction": _ask_direction,
    "still": _ask_still,
}


def ask_several(rng: np.random.RandomState, prompt: Prompt, task: str, turn: int) -> Question | None:
    """One question of a task.

    Args:
        rng: the source of randomness; it is advanced.
        prompt: the pictures asked about.
        task: a name in IMAGES_TASKS or VIDEO_TASKS, whichever fits the prompt.
        turn: an even one asks ``exist`` and ``still`` for a yes, and the tasks that name a scene about the first one;
            an odd one for a no, and about the second. The others do not use it.

    Returns:
        The question, or None where the prompt cannot carry one of this task.

    Raises:
        ValueError: a task that is unknown or not one of such a prompt.
    """
    known = IMAGES_TASKS if isinstance(prompt, Images) else VIDEO_TASKS
    if task not in known:
        raise ValueError(f"task={task!r}; expected one of {', '.join(known)}")
    if task in SINGLE_TASKS:
        return _ask_single(rng, prompt, task, turn)
    return _ASK[task](rng, prompt, turn)
