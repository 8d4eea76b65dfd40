"""Prompts with several pictures: deterministic, and labels that agree with the scenes and with the pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from vlmattn.scenes.packing import IGNORE, MONITOR_STREAM, PRETRAINING_STREAM, TRAINING_STREAM
from vlmattn.scenes.questions import Question
from vlmattn.scenes.several import CHANGES, DIRECTIONS, FLICKER, Images, Prompt, Video
from vlmattn.scenes.several_kinds import IMAGES, KINDS, VIDEO, Kind
from vlmattn.scenes.several_packing import pack_several, several_batch
from vlmattn.scenes.several_questions import SINGLE_TASKS, ask_several
from vlmattn.scenes.splits import SPLITS
from vlmattn.scenes.text import ASSISTANT_ID, EOS_ID, NUMBER_NAMES, SHAPE_PLURALS, UNKNOWN_ID, WORDS, encode
from vlmattn.scenes.world import COLORS, WORLDS, Plate, Scene

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
videos = pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.video], ids=lambda kind: kind.name)


def prompts(kind: Kind, count: int) -> Iterator[tuple[np.random.RandomState, Prompt]]:
    for number in range(count):
        yield kind.sample(15, 0, number, 0.4)


def questions(kind: Kind, count: int) -> Iterator[tuple[Prompt, Question]]:
    for number, (rng, prompt) in enumerate(prompts(kind, count)):
        for task in kind.tasks:
            if question := ask_several(rng, prompt, task, number // 4):
                yield prompt, question


def held(scene: Scene) -> dict[str, str]:
    """Cell name -> name of what lies there, without Scene.content."""
    names = scene.world.cell_names
    return {names[item.cell]: item.name for item in scene.objects} | {names[p.cell]: "digits" for p in scene.plates}


@every_kind
def test_streams_of_kinds_and_single_pictures_are_all_different(kind: Kind) -> None:
    words = [PRETRAINING_STREAM, TRAINING_STREAM, MONITOR_STREAM, *(split.stream for split in SPLITS.values())]
    others = [0, *(other.stream for other in KINDS.values())]
    keys = [world.stream + offset + word for world in WORLDS.values() for offset in others for word in words]
    assert len(set(keys)) == len(keys)
    assert kind.world.stream in {world.stream for world in WORLDS.values()}


@every_kind
def test_pictures_fit_the_training(kind: Kind) -> None:
    tokens = 0
    for visual in kind.visuals:
        assert visual.height % 8 == visual.width % 8 == visual.frames % 2 == 0
        tokens += visual.height // 8 * (visual.width // 8) * max(1, visual.frames // 2)
    assert tokens <= 300
    assert sum(max(1, visual.frames) for visual in kind.visuals) == kind.pictures
    rng, prompt = kind.sample(15, 0, 1)
    pixels, boxes = prompt.render(rng)
    assert pixels.shape == (kind.pictures, *kind.world.size, 3) and pixels.dtype == np.uint8
    assert len(boxes) == kind.pictures


def test_images_are_the_same_or_differ_in_one_opaque_object() -> None:
    seen = set()
    for number, (_, prompt) in enumerate(prompts(IMAGES, 120)):
        assert isinstance(prompt, Images)
        assert (prompt.change == "") == (number % 2 == 0)
        first, second = ({(item.type, item.cell) for item in scene.objects} for scene in prompt.scenes)
        gone, come = first - second, second - first
        if not prompt.change:
            assert prompt.scenes[0] == prompt.scenes[1]
            continue
        assert prompt.scenes[0].plates == prompt.scenes[1].plates and first and second
        items = {item for scene in prompt.scenes for item in scene.objects}
        assert all(item.opacity == 1 for item in items if (item.type, item.cell) in gone | come)
        assert sorted((len(gone), len(come))) == ([0, 1] if prompt.change == "removed" else [1, 1])
        kinds, cells = ([pair[part] for pair in (*gone, *come)] for part in (0, 1))
        assert (len(set(cells)) > 1) == (prompt.change == "moved")
        assert (len(set(kinds)) > 1) == (prompt.change in ("replaced", "recolored"))
        if prompt.change == "recolored":
            assert len({kind % 8 for kind in kinds}) == 1
        seen.add((prompt.change, len(first) > len(second)))
    assert seen == {(change, False) for change in CHANGES} | {("removed", True)}


def test_images_are_drawn_anew_even_when_they_are_the_same() -> None:
    for rng, prompt in prompts(IMAGES, 10):
        pixels, boxes = prompt.render(rng)
        assert np.abs(pixels[0].astype(float) - pixels[1]).mean() > 5
        for found, scene in zip(boxes, prompt.scenes, strict=True):
            assert [box.item for box in found] == [*scene.objects, *scene.plates]


@videos
def test_one_object_moves_steadily_and_everything_else_stays(kind: Kind) -> None:
    for rng, prompt in prompts(kind, 80):
        assert isinstance(prompt, Video)
        pixels, boxes = prompt.render(rng)
        tracks = [[(frame[index].top, frame[index].left) for frame in boxes] for index in range(len(boxes[0]))]
        assert [index for index, track in enumerate(tracks) if len(set(track)) > 1] == [prompt.mover]
        steps = np.array([np.subtract(after, before) for before, after in pairwise(tracks[prompt.mover])])
        total = steps.sum(axis=0)
        assert np.abs(steps - total / len(steps)).max() <= 1
        assert list(total) == [
            way * prompt.distance * side
            for way, side in zip(DIRECTIONS[prompt.direction], kind.world.cell_size, strict=True)
        ]
        for scene, frame in zip(prompt.scenes, (boxes[0], boxes[-1]), strict=True):
            assert [box.item for box in frame[: prompt.mover]] == list(scene.objects[: prompt.mover])
            box, cell = frame[prompt.mover], scene.objects[prompt.mover].cell
            middle = box.top + box.height / 2, box.left + box.width / 2
            places = zip(middle, kind.world.place(cell), kind.world.cell_size, strict=True)
            assert all(place * side <= at <= (place + 1) * side for at, place, side in places)
        still = np.ones(pixels.shape[1:3], dtype=bool)
        for frame in boxes:
            box = frame[prompt.mover]
            still[box.top : box.top + box.height, box.left : box.left + box.width] = False
        for box in boxes[0]:
            if isinstance(box.item, Plate):
                still[box.top : box.top + box.height, box.left : box.left + box.width] = True
        change = np.diff(pixels.astype(float), axis=0)[:, still]
        assert change.any() and np.abs(change).max() < 10 * FLICKER


@videos
def test_what_moved_and_where_is_read_off_the_pixels(kind: Kind) -> None:
    """The pixels that turn to the colour of the answer, and those that turn away from it, give the direction."""
    right = 0
    for rng, prompt in prompts(kind, 100):
        moved, direction = (ask_several(rng, prompt, task, 0) for task in ("moved", "direction"))
        assert moved and direction and moved.answer in direction.text
        pixels = prompt.render(rng)[0].astype(float)
        color = np.array(COLORS[moved.answer.split()[0]], dtype=float)
        nearer = np.abs(pixels[0] - color).sum(-1) - np.abs(pixels[-1] - color).sum(-1)
        start, end = (np.argwhere(sign * nearer > 60).mean(axis=0) for sign in (-1, 1))
        away = end - start
        right += direction.answer == max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], away))
    assert right >= 98


def answer(prompt: Prompt, text: str) -> str | None:
    """The answer to a question, worked out from its words and the two scenes; None for a rule that is not here."""
    cells = [held(scene) for scene in prompt.scenes]
    objects = [{name for name in there.values() if name != "digits"} for there in cells]
    places = {
        name: {cell for there in cells for cell, held in there.items() if held == name}
        for name in objects[0] | objects[1]
    }
    if text == "Are the two images the same?":
        return "yes" if cells[0] == cells[1] else "no"
    if text == "What moved in the video?":
        return next(name for name, where in places.items() if len(where) > 1)
    if match := re.fullmatch(r"Is the (.+) still\?", text):
        return "yes" if len(places[match[1]]) == 1 else "no"
    if match := re.fullmatch(r"Is the (.+) moved left, right, up or down\?", text):
        rows, columns = _way(prompt, match[1])
        return ("up" if rows < 0 else "down") if rows else "left" if columns < 0 else "right"
    if match := re.fullmatch(r"In what image is there an? (.+)\?", text):
        there = [name for name, names in zip(("first", "second"), objects, strict=True) if match[1] in names]
        return " and ".join(there) or "none"
    words, view = named_scene(prompt, text)
    return _answer_about(prompt.scenes[view], words)


def named_scene(prompt: Prompt, text: str) -> tuple[str, int]:
    """A question without the scene that it names, and which of the two that is."""
    match = re.fullmatch(rf"(.+) (?:in|of) ({'|'.join(prompt.views)})\?", text)
    assert match, text
    return match[1], prompt.views.index(match[2])


def _way(prompt: Prompt, name: str) -> tuple[int, int]:
    (row, column), (last_row, last_column) = (
        scene.world.place(next(item.cell for item in scene.objects if item.name == name)) for scene in prompt.scenes
    )
    return last_row - row, last_column - column


def _answer_about(scene: Scene, words: str) -> str | None:
    there = held(scene)
    at = {name: scene.world.place(scene.world.cell_names.index(cell)) for cell, name in there.items()}
    names = [name for name in there.values() if name != "digits"]
    if match := re.fullmatch(r"Is there an? (.+)", words):
        return "yes" if match[1] in names else "no"
    if match := re.fullmatch(r"Where is the (.+)", words):
        return next((cell for cell, name in there.items() if name == match[1]), None)
    if match := re.fullmatch(r"What is in the (.+)", words):
        return there.get(match[1], "nothing")
    if match := re.fullmatch(r"What is just (left of|right of|above|below) the (.+)", words):
        down, right = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[match[1]]
        row, column = at[match[2]]
        return there.get(scene.world.cell_names[(row + down) * scene.world.grid + column + right], "nothing")
    if match := re.fullmatch(r"What color is the (.+)", words):
        return next(name.split()[0] for name in names if name.endswith(match[1]))
    if match := re.fullmatch(r"What shape is the (.+) object", words):
        return next(name.split()[1] for name in names if name.startswith(match[1]))
    if match := re.fullmatch(r"How many (.+) are there", words):
        shapes = {plural: shape for shape, plural in SHAPE_PLURALS.items()}
        part = "" if match[1] == "objects" else shapes.get(match[1], match[1].split()[0])
        return NUMBER_NAMES[sum(part in name for name in names)]
    if match := re.fullmatch(r"Is the (.+) (left|above) or (right of|below) the (.+)", words):
        axis = 0 if match[2] == "above" else 1
        return match[2] if at[match[1]][axis] < at[match[4]][axis] else match[3].split()[0]
    if words == "What digits are shown":
        return scene.plates[0].text
    if match := re.fullmatch(r"What digits are in the (.+)", words):
        return next(plate.text for plate in scene.plates if scene.world.cell_names[plate.cell] == match[1])
    return None


@every_kind
def test_labels_are_true(kind: Kind) -> None:
    asked: dict[str, int] = {}
    for prompt, question in questions(kind, 120):
        assert question.answer == answer(prompt, question.text), question
        asked[question.task] = asked.get(question.task, 0) + 1
    assert set(asked) == set(kind.tasks) and min(asked.values()) >= 50


@every_kind
def test_changed_is_about_a_place_that_differs(kind: Kind) -> None:
    for prompt, question in questions(kind, 80):
        if question.task == "changed":
            words, view = named_scene(prompt, question.text)
            assert _answer_about(prompt.scenes[1 - view], words) not in (question.answer, None)


@every_kind
def test_many_questions_need_the_right_scene(kind: Kind) -> None:
    """Of those that name a scene, a good share has another answer in the other one."""
    named = differ = 0
    for prompt, question in questions(kind, 100):
        if question.task in ("loc", "cell", "changed", "exist"):
            words, view = named_scene(prompt, question.text)
            differ += _answer_about(prompt.scenes[1 - view], words) != question.answer
            named += 1
    assert differ / named > 0.3


@every_kind
def test_answers_are_balanced(kind: Kind) -> None:
    answers: dict[str, list[str]] = {}
    for _, question in questions(kind, 400):
        answers.setdefault(question.task, []).append(question.answer)
    for task, mine in answers.items():
        shares = {text: mine.count(text) / len(mine) for text in set(mine)}
        if set(shares) <= {"yes", "no"}:
            assert 0.45 < shares["yes"] < 0.55, (task, shares)
        if task == "direction":
            assert set(shares) == set(DIRECTIONS) and max(shares.values()) == 0.25
        if task == "which":
            assert set(shares) == {"first", "second", "first and second", "none"}
            assert min(shares.values()) > 0.08 and max(shares.values()) < 0.5
        if task == "moved":
            assert max(shares.values()) < 0.15


def test_one_sided_objects_do_not_give_existence_away() -> None:
    """An object that only one image has is asked about in either image about as often."""
    labels = []
    for number, (rng, prompt) in enumerate(prompts(IMAGES, 480)):
        question = ask_several(rng, prompt, "exist", number // 4)
        assert question
        name = re.findall(r"there an? (.+) in", question.text)[0]
        if sum(name in held(scene).values() for scene in prompt.scenes) == 1:
            labels.append(question.answer)
    assert len(labels) > 100
    assert 0.4 < labels.count("yes") / len(labels) < 0.6


@every_kind
def test_turns_ask_for_yes_and_no_and_for_both_scenes(kind: Kind) -> None:
    for rng, prompt in prompts(kind, 20):
        for turn in range(2):
            for task in {"exist", "still"} & set(kind.tasks):
                question = ask_several(rng, prompt, task, turn)
                assert question and question.answer == ("yes", "no")[turn]
            for task in {*SINGLE_TASKS, "changed"} & set(kind.tasks):
                question = ask_several(rng, prompt, task, turn)
                assert question is None or prompt.views[turn] in question.text


@every_kind
def test_existence_is_asked_of_both_scenes_with_both_answers(kind: Kind) -> None:
    asked = set()
    for number, (rng, prompt) in enumerate(prompts(kind, 40)):
        question = ask_several(rng, prompt, "exist", number)
        assert question
        asked.add((question.answer, named_scene(prompt, question.text)[1]))
    assert asked == {(label, view) for label in ("yes", "no") for view in (0, 1)}


def test_unknown_and_foreign_tasks_are_named() -> None:
    rng, images = IMAGES.sample(15, 0, 0)
    _, video = VIDEO.sample(15, 0, 0)
    for prompt, task in ((images, "moved"), (video, "same"), (images, "colour")):
        with pytest.raises(ValueError, match=f"task='{task}'; expected one of .*changed"):
            ask_several(rng, prompt, task, 0)


@every_kind
def test_all_words_are_in_the_vocabulary(kind: Kind) -> None:
    for _, question in questions(kind, 100):
        assert UNKNOWN_ID not in encode(question.text) + encode(question.answer)


@every_kind
def test_training_samples_hold_their_questions_in_slots(kind: Kind) -> None:
    batch = several_batch(kind, 3, 10, 12)
    assert batch.pixels.shape == (12, kind.pictures, *kind.world.size, 3)
    assert batch.ids.shape == batch.weights.shape == batch.cells.shape == (12, kind.course.packed_length)
    starts = set()
    group = 0
    for slots, length in kind.course.slot_groups:
        starts |= set(range(group, group + slots * length, length))
        group += slots * length
    assert group == kind.course.packed_length
    mentions = 0
    for row, number in enumerate(range(10, 22)):
        rng, prompt = kind.sample(TRAINING_STREAM, 3, number, anchors=(1, kind.world.max_anchors))
        assert np.array_equal(prompt.render(rng)[0], batch.pixels[row])
        packed = pack_several(rng, prompt, kind.course)
        assert np.array_equal(packed.ids, batch.ids[row])
        assert len(packed.slots) >= 12
        for slot in packed.slots:
            begin = max(start for start in starts if start < slot.answer)
            words = packed.ids[begin : slot.end + 1].tolist()
            assert words[slot.answer - begin - 1] == ASSISTANT_ID and words[-1] == EOS_ID
            assert (packed.weights[slot.answer : slot.end + 1] > 0).all()
            assert not packed.weights[begin : slot.answer].any()
        assert (packed.weights > 0).sum() == sum(slot.end + 1 - slot.answer for slot in packed.slots)
        for at in np.flatnonzero(packed.cells != IGNORE):
            name = " ".join(WORDS[word] for word in packed.ids[at - 1 : at + 1])
            cell = kind.world.cell_names[packed.cells[at]] if packed.cells[at] < kind.world.cells else None
            for scene in prompt.scenes:
                assert (name in scene_names(scene)) == (cell is not None) and held(scene).get(cell or "", name) == name
            mentions += 1
    assert mentions > 60


def scene_names(scene: Scene) -> set[str]:
    return {item.name for item in scene.objects}


@every_kind
def test_every_question_fits_its_slot(kind: Kind) -> None:
    for number, (rng, prompt) in enumerate(prompts(kind, 60)):
        for tasks, length in zip(kind.course.groups, kind.course.lengths, strict=True):
            for task in tasks:
                question = ask_several(rng, prompt, task, number)
                assert question is None or len(encode(question.text)) + len(encode(question.answer)) + 2 <= length


def test_the_longest_names_fit_their_slots() -> None:
    """Of single tasks at their longest: two-word places, three digits, and the longest view."""
    view, place = IMAGES.sample(15, 0, 0)[1].views[1], "upper midleft"
    texts = {
        "which": f"In what image is there an orange star? {'first and second'}",
        "cell": f"What is in the {place} of {view}? orange star",
        "next": f"What is just left of the orange star in {view}? orange star",
        "digits": f"What digits are in the {place} of {view}? 1 2 3",
        "rel": f"Is the orange star left or right of the orange star in {view}? left",
        "count": f"How many orange objects are there in {view}? one",
    }
    for tasks, length in zip(IMAGES.course.groups, IMAGES.course.lengths, strict=True):
        assert all(len(encode(texts[task])) + 2 <= length for task in tasks if task in texts)


def test_samples_depend_on_their_number_alone_and_anchors_bound_the_images() -> None:
    whole, part = several_batch(IMAGES, 5, 0, 6), several_batch(IMAGES, 5, 4, 2)
    assert all(np.array_equal(mine[4:], other) for mine, other in zip(whole, part, strict=True))
    assert not np.array_equal(whole.ids, several_batch(IMAGES, 6, 0, 6).ids)
    for number in range(20):
        _, prompt = IMAGES.sample(TRAINING_STREAM, 5, number, anchors=(1, 1))
        assert min(len(scene.objects) for scene in prompt.scenes) >= 1
        assert max(len(scene.objects) for scene in prompt.scenes) <= 2
