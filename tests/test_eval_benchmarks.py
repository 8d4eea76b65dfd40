"""Exact match, the composition of the scenes benchmark, benchmarks by name, and how fast a run is scored."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmattn.errors import DataError
from vlmattn.eval import bench
from vlmattn.eval.benchmarks import exact, localisation, pope, scenes
from vlmattn.eval.items import Benchmark, Item, Said
from vlmattn.scenes import benchmark
from vlmattn.scenes.questions import existence
from vlmattn.scenes.render import plate_size
from vlmattn.scenes.splits import ALL_TASKS, TASKS
from vlmattn.scenes.text import UNKNOWN_ID, encode
from vlmattn.scenes.world import NUM_TYPES, WORLDS, absent_partners, type_name


@pytest.fixture(scope="module")
def whole() -> Benchmark:
    return bench.load("scenes", embedded=True, scenes_count=60, tasks=scenes.ALL_TASKS)


def answers(items: tuple[Item, ...], seed: int, wrong: float = 0.3) -> list[Said]:
    """The labels, some of them exchanged within their task."""
    rng = random.Random(seed)
    labels: dict[str, list[str]] = {}
    for item in items:
        labels.setdefault(item.group, []).append(item.label)
    return [
        Said(item.id, rng.choice(labels[item.group]) if rng.random() < wrong else item.label, rng.random() < 0.05)
        for item in items
    ]


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("Red.", "red", True),
        (" 4 2 ", "42", True),
        ("4 2", "4 2", True),
        ("red circle", "Red Circle", True),
        ("red", "green", False),
        ("reds", "red", False),
        ("", "red", False),
        ("red...", "red", True),
        ("red, blue", "red", False),
    ],
)
def test_exact_match(text: str, label: str, right: bool) -> None:
    item, said = Item("a", "1.png", "?", label, "color"), Said("a", text)
    assert exact.is_right(item, said) is right
    assert exact.KIND.count([(item, said)]) == (int(right), 1, int(not text))
    assert exact.KIND.verdict(item, said) == exact.normal(text)


def test_default_tasks_and_kinds(whole: Benchmark) -> None:
    asked = bench.load("scenes", embedded=True, scenes_count=5).items
    assert {item.group for item in asked} == set(scenes.chosen(None))
    assert scenes.chosen(None) == (
        *("random", "popular", "adversarial", "color", "shape", "cell", "next", "count", "digits", "loc"),
        *("pairs", "pair-color", "pair-place", "pair-rel", "caption"),
    )
    kinds = {group: whole.scorer.kind(group).name for group in scenes.ALL_TASKS}
    assert Counter(kinds.values()) == {"yes_no": 4, "exact": 7, "place": 1, "pairs": 4, "caption": 1}
    with pytest.raises(DataError, match="'colour' is not a task of the scenes; did you mean 'color'"):
        whole.scorer.kind("colour")


def test_right_answers_score_full_marks(whole: Benchmark) -> None:
    score = whole.scorer.score(whole.items, [Said(item.id, item.label) for item in whole.items])
    values = score["values"]
    for key in ("mean_accuracy", "mean_f1", "mean_exact", "loc.hit", "caption.recall", "caption.f1"):
        assert values[key] == 1.0
    assert values["caption.chair_i"] == values["caption.chair_s"] == values["loc.invalid"] == score["unparsed"] == 0
    assert values["mean_pairs"] == values["pairs.score"] == values["pair-rel.score"] == 200.0
    assert 0.3 < values["loc.iou"] < 0.7, "an object is smaller than its place"
    assert score["undefined"] == []


def test_headlines_are_few_and_stand_in_their_order(whole: Benchmark) -> None:
    tally = whole.scorer.tally(whole.items, answers(whole.items, 0))
    headlines = [metric.key for metric in tally.metrics if metric.headline]
    assert sorted(headlines) == sorted(scenes.HEADLINES) and 6 <= len(headlines) <= 9
    values = tally.values()
    assert values["mean_exact"] == pytest.approx(sum(values[f"{group}.accuracy"] for group in scenes.EXACT) / 7)
    assert values["mean_pairs"] == pytest.approx(sum(values[f"{group}.score"] for group in scenes.PAIRS) / 4)
    assert values["mean_f1"] == pytest.approx(sum(values[f"{group}.f1"] for group in pope.CATEGORIES) / 3)
    assert all(metric.headline == (metric.key in scenes.HEADLINES) for metric in tally.metrics)


def test_an_aggregate_without_its_tasks_is_left_out() -> None:
    part = bench.load("scenes", embedded=True, scenes_count=3, tasks=("loc", "digits"))
    keys = [metric.key for metric in part.scorer.tally(part.items, answers(part.items, 1)).metrics]
    assert "mean_exact" in keys and "loc.hit" in keys and "mean_f1" not in keys and "mean_pairs" not in keys


def test_order_of_answers_changes_nothing_and_sums_add_up_over_images(whole: Benchmark) -> None:
    said = answers(whole.items, 2)
    shuffled = random.Random(0).sample(said, len(said))
    assert whole.scorer.score(whole.items, shuffled) == whole.scorer.score(whole.items, said)
    tally = whole.scorer.tally(whole.items, said)
    by_id = {answer.id: answer for answer in said}
    total = 0.0
    for image in tally.images[:10]:
        mine = [item for item in whole.items if item.image == image]
        alone = whole.scorer.tally(mine, [by_id[item.id] for item in mine])
        row = dict(zip(tally.columns, tally.sums[tally.images.index(image)], strict=True))
        assert dict(zip(alone.columns, alone.sums[0], strict=True)) == {key: row[key] for key in alone.columns}
        total += alone.sums.sum()
    assert total == pytest.approx(tally.sums[:10].sum())


def test_profiles_reach_yes_no_and_pairs() -> None:
    strict = bench.scorer("scenes", "lmms_eval")
    assert strict.kind("random") is pope.kind("lmms_eval") and strict.kind("pairs").name == "pairs"
    item = Item("a", "1.png", "?", "yes", "random")
    assert bench.scorer("scenes").kind("random").mark(item, Said("a", "Yes, it is.")) is True
    assert strict.kind("random").mark(item, Said("a", "Yes, it is.")) is False


def test_tasks_in_any_order_are_the_same_benchmark() -> None:
    one = bench.load("scenes", embedded=True, scenes_count=3, tasks=("digits", "loc"))
    other = bench.load("scenes", embedded=True, scenes_count=3, tasks=("loc", "digits"))
    assert one.sha256 == other.sha256 and one.items == other.items


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_is_a_benchmark_of_its_own(world: str) -> None:
    made = bench.load("scenes", embedded=True, scenes_count=8, tasks=scenes.ALL_TASKS, world=world)
    assert {item.group for item in made.items} == set(scenes.ALL_TASKS)
    assert dict(made.pictures) == {"scenes": "test", "world": world} and f"of world {world}," in made.source
    assert made.open_image(made.items[0].image).size[::-1] in WORLDS[world].sizes
    assert made.validation is not None and made.validation().pictures == {"scenes": "val", "world": world}
    score = made.scorer.score(made.items, [Said(item.id, item.label) for item in made.items])
    assert {*score["values"]} >= {"mean_pairs", "loc.iou"} and score["values"]["loc.hit"] == 1.0
    others = [bench.load("pope", embedded=True, scenes_count=8, world=name).sha256 for name in WORLDS]
    assert len({*others}) == len(WORLDS)


def test_the_tasks_are_those_of_the_splits() -> None:
    assert {scenes.in_splits(task) for task in scenes.ALL_TASKS} == {*ALL_TASKS}


def test_pairs_ask_for_one_object_that_is_there_and_one_that_is_not() -> None:
    data = benchmark("test", ("pairs",), 60)
    by_image: dict[str, list[dict]] = {}
    for row in data.rows:
        by_image.setdefault(row["image"], []).append(row)
    names = {existence(kind): kind for kind in range(NUM_TYPES)}
    partners = 0
    for image, rows in by_image.items():
        assert [row["label"] for row in rows] == ["yes", "no"]
        scene = data.scene(image)
        there, absent = (names[row["text"]] for row in rows)
        assert there in scene.types and absent not in scene.types
        expected = absent_partners(scene)
        assert not expected or absent in expected
        partners += bool(expected)
    assert 0 < partners < len(by_image), "both kinds of negatives occur"


@pytest.mark.parametrize("world", WORLDS)
def test_pairs_change_no_other_question_and_use_known_words(world: str) -> None:
    with_pairs, without = benchmark("test", ALL_TASKS, 20, world=world), benchmark("test", TASKS, 20, world=world)
    strip = [{**row, "question_id": 0} for row in with_pairs.rows if row["task"] != "pairs"]
    assert strip == [{**row, "question_id": 0} for row in without.rows]
    assert all(UNKNOWN_ID not in encode(row["text"]) for row in with_pairs.rows)
    assert benchmark("test", ("pairs",), 5, 1, world).rows != benchmark("test", ("pairs",), 5, 0, world).rows


@pytest.mark.parametrize("world", WORLDS)
def test_gold_of_captions_and_boxes(world: str) -> None:
    data = benchmark("test", ("loc", "caption"), 20, world=world)
    for row in data.rows:
        gold, scene = data.gold(row), data.scene(row["image"])
        if row["task"] == "caption":
            assert gold == {"objects": [type_name(kind) for kind in scene.types]}
            assert all(name in row["label"] for name in gold["objects"])
            continue
        name = row["text"].removeprefix("Where is the ").removesuffix("?")
        [box] = [box for box in data.boxes(row["image"]) if getattr(box.item, "name", None) == name]
        height, width = scene.world.size
        x0, y0, x1, y1 = (share * side for share, side in zip(gold["box"], (width, height) * 2, strict=True))
        assert (round(x0), round(y0), round(x1 - x0), round(y1 - y0)) == (box.left, box.top, box.width, box.height)
        assert (box.width, box.height) != plate_size(data.world)
        assert localisation.iou(tuple(gold["box"]), scenes.PLACES[row["label"]]) > 0.1


def test_only_captions_and_boxes_have_gold(whole: Benchmark) -> None:
    assert {item.group for item in whole.items if item.gold} == {"loc", "caption"}


def test_gold_is_no_part_of_the_hash(whole: Benchmark) -> None:
    data = benchmark("test", [f"exist-{task}" for task in pope.CATEGORIES], 10)
    assert bench.load("pope", embedded=True, scenes_count=10).sha256 == data.sha256
    assert all(data.gold(row) == {} for row in data.rows)


@pytest.mark.parametrize("name", bench.NAMES)
def test_validation_has_the_same_tasks_and_other_images(name: str) -> None:
    test = bench.load(name, embedded=True, scenes_count=30)
    assert test.validation is not None
    val = test.validation()
    assert val.validation is None and val.sha256 != test.sha256 and val.scorer is test.scorer
    assert {item.group for item in val.items} == {item.group for item in test.items}

    def pictures(made: Benchmark) -> set[str]:
        return {hashlib.sha256(made.open_image(item.image).tobytes()).hexdigest() for item in made.items[::5]}

    assert not pictures(test) & pictures(val)
    assert bench.load(name, embedded=True, scenes_count=30, split="val").sha256 == val.sha256


def test_pictures_are_found_again(whole: Benchmark, tmp_path: Path) -> None:
    name = whole.items[0].image
    assert dict(whole.pictures) == {"scenes": "test", "world": scenes.DEFAULT_WORLD}
    assert bench.open_pictures(whole.pictures)(name).tobytes() == whole.open_image(name).tobytes()
    with pytest.raises(DataError, match=r"has no picture 'cat\.jpg'"):
        bench.open_pictures(whole.pictures)("cat.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    opened = bench.open_pictures({"folder": str(tmp_path)})
    assert opened("a.png").mode == "RGB"
    with pytest.raises(OSError):
        opened("b.png")


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ({"folder": "nowhere/at/all"}, "nowhere/at/all, is not there any more"),
        ({"scenes": "tests", "world": "2"}, "'tests' of the scenes is unknown; did you mean 'test'"),
        ({"scenes": "test", "world": "3"}, "world '3' of the scenes is unknown"),
        ({"scenes": "test"}, "pictures={'scenes': 'test'}; expected {'scenes': split, 'world': name}"),
        ({}, "expected {'scenes': split, 'world': name} or {'folder': path}"),
    ],
)
def test_pictures_that_are_gone_are_named(pictures: dict[str, str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        bench.open_pictures(pictures)
    assert words in str(caught.value)


def test_files_of_pope_are_a_benchmark(tmp_path: Path) -> None:
    benchmark("test", [f"exist-{task}" for task in pope.CATEGORIES], 3).save(tmp_path)
    made = bench.load("pope", embedded=True, data=tmp_path)
    assert dict(made.pictures) == {"folder": str((tmp_path / "images").resolve())}
    assert made.validation is None and len(made.files) == 3
    assert made.open_image(made.items[0].image).size == (96, 96)
    assert bench.open_pictures(made.pictures)(made.items[0].image).size == (96, 96)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "poep"}, "'poep' is unknown; did you mean 'pope'"),
        ({"name": "scenes", "profile": "strict"}, "profile 'strict' is unknown"),
        ({"name": "pope", "profile": "strict"}, "profile 'strict' is unknown"),
        ({"name": "scenes", "prompt": "vicuna"}, "template 'vicuna' is unknown"),
        ({"name": "scenes", "prompt": "single_word"}, "which no caption is"),
        ({"name": "scenes", "tasks": ("colour",)}, "task 'colour' is unknown; did you mean 'color'"),
        ({"name": "scenes", "tasks": ()}, "no tasks to ask"),
        ({"name": "scenes", "split": "tests"}, "split='tests'"),
        ({"name": "scenes", "world": "3"}, "world '3' of the scenes is unknown"),
        ({"name": "pope", "world": "3"}, "world '3' of the scenes is unknown"),
        ({"name": "pope", "world": "2", "data": "somewhere"}, "--world 2 is about rendered scenes"),
        ({"name": "scenes", "scenes_count": 0}, "images=0"),
        ({"name": "scenes", "data": "somewhere"}, "leave --data out"),
        ({"name": "scenes", "images": "somewhere"}, "leave --images out"),
        ({"name": "scenes", "words": "nowhere.json"}, "nowhere.json: cannot be read"),
        ({"name": "pope", "words": "nowhere.json"}, "'pope' has no captions"),
        ({"name": "pope", "tasks": ("random",)}, "--tasks belongs to --bench scenes"),
        ({"name": "pope", "images": "somewhere"}, "say --data FOLDER too"),
        ({"name": "pope", "embedded": False}, "POPE for a downloaded model needs"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(DataError) as caught:
        bench.load(**{"embedded": True, **arguments})
    assert words in str(caught.value)


def test_a_word_table_can_be_given_for_the_captions(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text('{"classes": {"red circle": ["disc"], "blue star": []}, "word_pairs": {"blue star": "blue star"}}')
    item = Item("caption/1", "1.png", "Describe the image.", "", "caption", {"objects": ["red circle"]})
    values = bench.scorer("scenes", words=path).score([item], [Said("caption/1", "A disc, a blue star.")])["values"]
    assert values["caption.chair_i"] == 0.5 and values["caption.recall"] == 1.0


def test_nine_thousand_records_are_scored_within_two_seconds() -> None:
    """All kinds together. A wrong complexity shows as minutes; the bound leaves room for a slow machine."""
    made = bench.load("scenes", embedded=True, scenes_count=60)
    copies = 9000 // len(made.items) + 1
    items, said = [], []
    for copy in range(copies):
        for item, answer in zip(made.items, answers(made.items, copy), strict=True):
            items.append(Item(f"{copy}/{item.id}", f"{copy}/{item.image}", "", item.label, item.group, item.gold))
            said.append(answer._replace(id=f"{copy}/{answer.id}", text=f"{answer.text} "))
    assert len(items) >= 9000
    best = min(timed(made, items, said) for _ in range(2))
    assert best < 2.0, f"{len(items)} records took {best:.2f} s"


def timed(made: Benchmark, items: list[Item], said: list[Said]) -> float:
    from vlmattn.eval import stats

    start = time.perf_counter()
    scorer = bench.scorer(made.name)
    tally = scorer.tally(items, said)
    scorer.numbers(tally, items)
    stats.intervals(tally)
    return time.perf_counter() - start
