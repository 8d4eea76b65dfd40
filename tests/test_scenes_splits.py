"""The benchmark: splits, rows in POPE's form, content hashes, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmattn.errors import DataError
from vlmattn.scenes import SceneSet, benchmark
from vlmattn.scenes.export_data import main as export_data
from vlmattn.scenes.packing import MONITOR_STREAM, PRETRAINING_STREAM, TRAINING_STREAM, training_batch
from vlmattn.scenes.questions import EXISTENCE_TASKS, PAIR_TASKS
from vlmattn.scenes.splits import ALL_TASKS, SPLITS, TASKS
from vlmattn.scenes.versions import VERSIONS
from vlmattn.scenes.world import PARTNER, WORLDS, type_index

PUBLISHED_20 = {
    "2": "5a1ce15e90b1b2138787411fd2d3ef27ed13608654192bc0bb6a1f7cc50ca263",
    "qwen": "2f9e3f7478b179772eb5d131a50844b33ca65adc91c22d4117d1bdaedfb87cff",
}
"""Of benchmark("test", TASKS, 20, world=...); a change of one is a new version of the benchmark."""
EVERY_TASK_32 = {
    "2": "191172bbdd63dcff28dd7bbbbd360faa28b1bcc1b30e571e2396fb7c026f9d17",
    "qwen": "d277d1e5be0ae41691c01e90bb6328fcdbb9500dbdba902eae4ddc0d361a814f",
}
"""Of benchmark("test", ALL_TASKS, 32, world=...): with the pairs in MME's form."""


@pytest.fixture(scope="module")
def scenes() -> SceneSet:
    return benchmark("test", TASKS, 60)


def test_content_hash_is_pinned_and_depends_on_split_seed_and_tasks() -> None:
    for world, published in PUBLISHED_20.items():
        assert benchmark("test", TASKS, 20, world=world).sha256 == published
    sets = [benchmark(split, ("loc",), 5, seed, world) for split in SPLITS for seed in (0, 1) for world in WORLDS]
    assert len({scenes.sha256 for scenes in sets}) == len(sets)


@pytest.mark.parametrize("world", EVERY_TASK_32)
def test_the_first_scenes_and_all_their_questions_never_change(world: str) -> None:
    first = benchmark("test", ALL_TASKS, 32, world=world)
    assert len(first.names) == 32 and {row["task"] for row in first.rows} == set(ALL_TASKS)
    assert first.sha256 == EVERY_TASK_32[world]


def test_rows_have_popes_fields_and_balance(scenes: SceneSet) -> None:
    assert [row["question_id"] for row in scenes.rows] == list(range(1, len(scenes.rows) + 1))
    positives = {}
    for task in EXISTENCE_TASKS:
        rows = [row for row in scenes.rows if row["task"] == task]
        assert all(list(row) == ["question_id", "image", "text", "label", "task"] for row in rows)
        assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
        positives[task] = [(row["image"], row["text"]) for row in rows if row["label"] == "yes"]
        for name in {row["image"] for row in rows}:
            mine = [row["text"] for row in rows if row["image"] == name]
            assert len(mine) <= 6 and len(set(mine)) == len(mine)
    assert len({tuple(rows) for rows in positives.values()}) == 1
    assert (
        max(
            len([row for row in scenes.rows if row["image"] == n and row["task"] == "exist-random"])
            for n in scenes.names
        )
        == 6
    )


def test_existence_labels_are_true_and_adversarial_ones_ask_for_absent_partners(scenes: SceneSet) -> None:
    for row in scenes.rows:
        if row["task"] not in EXISTENCE_TASKS:
            continue
        words = row["text"].split()
        kind = type_index(words[3], words[4])
        present = scenes.scene(row["image"]).types
        assert (kind in present) == (row["label"] == "yes")
        if row["task"] == "exist-adversarial" and row["label"] == "no":
            assert PARTNER[kind] in present


def test_other_tasks_ask_one_question_per_scene_and_pairs_two_whatever_else_is_asked(scenes: SceneSet) -> None:
    asked = Counter((row["task"], row["image"]) for row in scenes.rows if row["task"] not in EXISTENCE_TASKS)
    assert all(count == (2 if task in PAIR_TASKS else 1) for (task, _), count in asked.items())
    alone = benchmark("test", ("loc",), 10)
    same = [row for row in scenes.rows if row["task"] == "loc"][:10]
    for one, other in zip(alone.rows, same, strict=True):
        assert {**one, "question_id": 0} == {**other, "question_id": 0}
        assert alone.image(one["image"]).tobytes() == scenes.image(one["image"]).tobytes()


def test_training_and_splits_share_no_scene() -> None:
    streams = [PRETRAINING_STREAM, TRAINING_STREAM, MONITOR_STREAM, *(split.stream for split in SPLITS.values())]
    keys = [world.stream + stream for world in WORLDS.values() for stream in streams]
    assert len(set(keys)) == len(keys)
    for version in VERSIONS.values():
        pictures = {image.tobytes() for image in training_batch(version, 0, 0, 40).pixels}
        for split in SPLITS:
            part = benchmark(split, ("caption",), 40, world=version.world.name)
            mine = {part.image(name).tobytes() for name in part.names}
            assert len(mine) == 40 and not mine & pictures
            pictures |= mine
    with pytest.raises(DataError, match="never listed"):
        benchmark("train")


def test_save_writes_pope_files(scenes: SceneSet, tmp_path: Path) -> None:
    small = benchmark("test", TASKS, 8)
    small.save(tmp_path)
    for task in EXISTENCE_TASKS:
        lines = (tmp_path / f"scenes_pope_{task.removeprefix('exist-')}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(list(row) == ["question_id", "image", "text", "label"] for row in rows)
        assert [row["text"] for row in rows] == [row["text"] for row in small.rows if row["task"] == task]
    others = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert others == [row for row in small.rows if row["task"] not in EXISTENCE_TASKS]
    assert json.loads((tmp_path / "scenes.json").read_text())["sha256"] == small.sha256
    for name in small.names:
        assert np.array_equal(np.array(Image.open(tmp_path / "images" / name)), np.array(small.image(name)))


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_data(["--out", str(tmp_path), "--images", "3", "--split", "counterfactual", "--tasks", "loc", "digits"])
    assert "3 pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_export_command_asks_every_published_task_of_its_world(tmp_path: Path) -> None:
    for world, options in (("2", []), *((world, ["--world", world]) for world in WORLDS)):
        export_data(["--out", str(tmp_path / world), "--images", "2", *options])
        about = json.loads((tmp_path / world / "scenes.json").read_text())
        assert (about["world"], tuple(about["tasks"])) == (world, TASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "holdout"}, "split='holdout'"),
        ({"tasks": ("exist-rare",)}, "exist-rare"),
        ({"tasks": ("same",)}, "same"),
        ({"world": "3"}, "world='3'"),
        ({"tasks": ()}, "tasks="),
        ({"tasks": ("loc", "loc")}, "different"),
        ({"images": 0}, "images=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        benchmark(**arguments)


def test_malformed_names_are_refused(scenes: SceneSet) -> None:
    for name in ("scene_1.png", "cat.jpg", "scene_00000x.png"):
        with pytest.raises(KeyError):
            scenes.image(name)


def test_no_torch_for_the_benchmark() -> None:
    code = (
        "import sys, vlmattn.scenes as s; s.benchmark(images=2).sha256;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
