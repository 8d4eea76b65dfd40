"""Scenes, pixels and answers: deterministic, and in agreement with one another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from vlmattn.scenes.questions import CAPTION_REQUEST, EXISTENCE_TASKS, OTHER_TASKS, ask, negatives
from vlmattn.scenes.render import RADII, Box, render, shape_mask
from vlmattn.scenes.text import NUMBER_NAMES, SHAPE_PLURALS, UNKNOWN_ID, encode
from vlmattn.scenes.world import (
    CELL_NAMES,
    CELL_SIZE,
    COLOR_NAMES,
    COLORS,
    GRID,
    NO_PARTNER,
    NUM_PAIRS,
    PARTNER,
    PARTNER_STRENGTH,
    POPULARITY,
    SHAPE_NAMES,
    Plate,
    Scene,
    SceneObject,
    absent_partners,
    random_state,
    sample_scene,
    type_index,
)

FIRST_32 = "83ecea482d90804c8f3217493e62c9e4dfe80cc603481980989b45e4df5f4e96"
"""Of the first 32 scenes and their questions; a change of it is a new version of benchmark and checkpoints."""
ALL_TASKS = ("exist-yes", "exist-frequency", *EXISTENCE_TASKS, *OTHER_TASKS)


def drawn(count: int, partner: float | None = 0.4) -> Iterator[tuple[Scene, np.ndarray, list[Box]]]:
    for number in range(count):
        rng = random_state(900, number)
        scene = sample_scene(rng, partner)
        yield scene, *render(rng, scene)


def first_scenes_hash() -> str:
    digest = hashlib.sha256()
    for number in range(32):
        rng = random_state(901, number)
        scene = sample_scene(rng)
        digest.update(render(rng, scene)[0].tobytes())
        for task in ALL_TASKS:
            question = ask(rng, scene, task)
            digest.update(json.dumps(question and [question.text, question.answer]).encode())
    return digest.hexdigest()


def test_scenes_and_questions_never_change() -> None:
    assert first_scenes_hash() == FIRST_32


def test_every_object_lies_where_its_label_says_and_looks_like_it() -> None:
    """Cells exactly; colours and shapes are read off the noisy pixels, so a stray error is allowed."""
    colors = shapes = opaque = 0
    for scene, pixels, boxes in drawn(150):
        items = [*scene.objects] + ([scene.plate] if scene.plate else [])
        assert [box.item for box in boxes] == items
        for box in boxes:
            corner = (box.left // CELL_SIZE, box.top // CELL_SIZE)
            assert corner == (box.item.cell % GRID, box.item.cell // GRID)
            assert ((box.left + box.width - 1) // CELL_SIZE, (box.top + box.height - 1) // CELL_SIZE) == corner
            if isinstance(box.item, Plate) or box.item.opacity < 1:
                continue
            opaque += 1
            patch = pixels[box.top : box.top + box.height, box.left : box.left + box.width].astype(float)
            colors += color_seen(patch, box.item) == box.item.color
            shapes += shape_seen(patch, box.item) == box.item.shape
    assert opaque > 300
    assert colors / opaque > 0.99
    assert shapes / opaque > 0.97


def color_seen(patch: np.ndarray, item: SceneObject) -> str:
    inside = patch[shape_mask(item.shape, len(patch) // 2 - 1) > 0.99].mean(0)
    palette = np.array(list(COLORS.values()), dtype=float)
    return COLOR_NAMES[int((palette @ inside / np.linalg.norm(palette, axis=1)).argmax())]


def shape_seen(patch: np.ndarray, item: SceneObject) -> str:
    rim = np.concatenate((patch[0], patch[-1], patch[:, 0], patch[:, -1]))
    contrast = (patch - np.median(rim, axis=0)) @ (np.array(COLORS[item.color]) - np.median(rim, axis=0))
    masks = [shape_mask(shape, len(patch) // 2 - 1) for shape in SHAPE_NAMES]
    return SHAPE_NAMES[int(np.argmax([np.corrcoef(contrast.ravel(), mask.ravel())[0, 1] for mask in masks]))]


def test_shape_masks_fill_their_box_and_differ() -> None:
    for radius in (radius for pair in RADII.values() for radius in pair):
        masks = [shape_mask(shape, radius) for shape in SHAPE_NAMES]
        for mask in masks:
            assert mask.shape == (2 * radius + 2,) * 2
            assert 0.15 < mask.mean() < 0.9
        for i, mask in enumerate(masks):
            assert all(np.abs(mask - other).sum() > radius for other in masks[:i])
    with pytest.raises(ValueError, match="hexagon"):
        shape_mask("hexagon", 7)


def test_plate_shows_its_digits() -> None:
    first = {}
    for number in range(300):
        rng = random_state(902, number)
        scene = sample_scene(rng)
        if scene.plate is None:
            continue
        pixels, boxes = render(rng, scene)
        box = boxes[-1]
        ink = pixels[box.top : box.top + box.height, box.left : box.left + box.width].mean(2) < 120
        known = first.setdefault(scene.plate.digits, ink)
        assert (ink == known).mean() > 0.995
    names = list(first)
    assert all((first[a] != first[b]).mean() > 0.01 for a, b in pairwise(names))


def test_partner_statistics() -> None:
    assert sum(PARTNER != NO_PARTNER) == 2 * NUM_PAIRS
    assert all(PARTNER[PARTNER[t]] == t for t in range(64) if PARTNER[t] != NO_PARTNER)
    assert PARTNER_STRENGTH[PARTNER != NO_PARTNER].mean() == pytest.approx(0.95, abs=0.005)
    assert POPULARITY.sum() == pytest.approx(1.0)
    for chance, low, high in ((None, 0.96, 0.99), (0.4, 0.50, 0.64), (0.0, 0.0, 0.0)):
        paired = together = 0
        for number in range(2000):
            scene = sample_scene(random_state(903, number), chance)
            assert len(set(scene.types)) == len(scene.types) <= 6
            assert len({item.cell for item in scene.objects}) == len(scene.objects)
            paired += sum(PARTNER[t] != NO_PARTNER for t in scene.types)
            together += sum(PARTNER[t] in scene.types for t in scene.types if PARTNER[t] != NO_PARTNER)
        assert low <= together / paired <= high


def oracle(scene: Scene, text: str) -> str:
    """The answer, worked out from the question's words alone."""
    named = {item.name: item for item in scene.objects}

    def only(values: list[str]) -> str:
        assert len(values) == 1
        return values[0]

    if match := re.fullmatch(r"Is there an? (\w+ \w+) in the image\?", text):
        return "yes" if match[1] in named else "no"
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", text):
        return CELL_NAMES[named[match[1]].cell]
    if match := re.fullmatch(r"What is in the (\w+)\?", text):
        cell = CELL_NAMES.index(match[1])
        if scene.plate is not None and scene.plate.cell == cell:
            return "digits"
        return next((item.name for item in scene.objects if item.cell == cell), "nothing")
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return only([item.color for item in scene.objects if item.shape == match[1]])
    if match := re.fullmatch(r"What shape is the (\w+) object\?", text):
        return only([item.shape for item in scene.objects if item.color == match[1]])
    if match := re.fullmatch(r"How many (?:(\w+) objects|(\w+)) are there\?", text):
        singular = {plural: shape for shape, plural in SHAPE_PLURALS.items()}.get(match[2])
        chosen = [i for i in scene.objects if match[1] in (None, i.color) and singular in (None, i.shape)]
        return NUMBER_NAMES[len(chosen)]
    if match := re.fullmatch(r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?", text):
        left, right = named[match[1]].cell % 3, named[match[2]].cell % 3
        assert left != right
        return "left" if left < right else "right"
    if match := re.fullmatch(r"Is the (\w+ \w+) above or below the (\w+ \w+)\?", text):
        upper, lower = named[match[1]].cell // 3, named[match[2]].cell // 3
        assert upper != lower
        return "above" if upper < lower else "below"
    assert text == "What digits are shown?"
    return "none" if scene.plate is None else " ".join(map(str, scene.plate.digits))


def test_answers_agree_with_the_scene() -> None:
    seen: dict[str, set[str]] = {}
    for scene, _, _ in drawn(150):
        rng = random_state(904, len(scene.objects))
        for task in ALL_TASKS:
            question = ask(rng, scene, task)
            if question is None:
                continue
            assert UNKNOWN_ID not in encode(question.text) + encode(question.answer)
            seen.setdefault(task, set()).add(question.answer)
            if task == "caption":
                assert question.text == CAPTION_REQUEST
                phrases = re.findall(r"an? (\w+) (\w+)[,.]", question.answer)
                assert sorted(type_index(*phrase) for phrase in phrases) == sorted(scene.types)
            else:
                assert question.answer == oracle(scene, question.text)
    assert set(seen) == set(ALL_TASKS)
    assert len(seen["loc"]) == 9 and len(seen["color"]) == 8 and len(seen["shape"]) == 8
    assert {"nothing", "digits"} < seen["cell"] and "none" in seen["digits"]


def test_caption_names_a_partner_right_after_its_anchor() -> None:
    for scene, _, _ in drawn(60, partner=1.0):
        question = ask(random_state(0), scene, "caption")
        assert question is not None
        order = [type_index(*phrase) for phrase in re.findall(r"an? (\w+) (\w+)[,.]", question.answer)]
        for kind in order:
            if PARTNER[kind] in order:
                assert abs(order.index(kind) - order.index(int(PARTNER[kind]))) == 1


def test_negatives_are_absent_and_of_their_category() -> None:
    for scene, _, _ in drawn(80):
        present = set(scene.types)
        by_popularity = sorted(set(range(64)) - present, key=lambda kind: -POPULARITY[kind])
        for category in ("random", "popular", "adversarial", "binding", "frequency"):
            kinds = negatives(random_state(905), scene, category, 3)
            assert len(set(kinds)) == len(kinds) and not set(kinds) & present
            if category == "popular":
                assert set(kinds) <= set(by_popularity[:8])
            if category == "adversarial":
                assert len(kinds) == min(3, len(absent_partners(scene)))
                assert all(PARTNER[kind] in present for kind in kinds)
            if category == "binding":
                assert all(any((k // 8 == p // 8) != (k % 8 == p % 8) for p in present) for k in kinds)
    with pytest.raises(ValueError, match="category='rare'"):
        negatives(random_state(0), scene, "rare")
    with pytest.raises(ValueError, match="task='smell'"):
        ask(random_state(0), scene, "smell")
