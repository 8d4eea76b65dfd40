"""The benchmark with several pictures: splits, rows, content hashes, files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmattn.errors import DataError
from vlmattn.scenes.several_kinds import KINDS, Kind
from vlmattn.scenes.several_packing import several_batch
from vlmattn.scenes.several_splits import benchmark_several, prompt_name
from vlmattn.scenes.splits import SPLITS

PUBLISHED_8 = {
    "images": "a671b3b496bf1d8c98970b98cd7c8cb30fa57c6c73cac816340560256edc8b09",
    "video": "02f025fa2bf2ae848e54a5b55164c487c8a21360d42209b65945fa17bf9d4886",
    "long-video": "8e2d08b579670cb8e0ebbedb56774acf470d23c7a02766774a54d7d7d184a8f5",
}
"""Of benchmark_several(kind, prompts=8); a change of one is a new version of the benchmark."""
TRAINING_4 = {
    "images": "ff71becdbe623eca3aa3e67d11e9205c8bd4e42b1e6eecd55426e1a69544aafa",
    "video": "f5d2072cad60bae5e2dc9874d52a16d320a018df2ab5dc435d5b380f54dcbbc6",
    "long-video": "2732983e8ff0922db50996d88905b81c19e989d9dc3e684c72838f0b059eee75",
}
"""Of the pixels, ids and weights of several_batch(kind, 0, 0, 4); a change of one is a new version of a checkpoint."""
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_content_hash_is_pinned_and_depends_on_split_and_seed(kind: Kind) -> None:
    assert benchmark_several(kind.name, prompts=8).sha256 == PUBLISHED_8[kind.name]
    sets = [benchmark_several(kind.name, split, ("loc",), 2, seed) for split in SPLITS for seed in (0, 1)]
    assert len({prompts.sha256 for prompts in sets}) == len(sets)


@every_kind
def test_training_samples_never_change(kind: Kind) -> None:
    batch = several_batch(kind, 0, 0, 4)
    arrays = (batch.pixels, batch.ids, batch.weights)
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() == TRAINING_4[kind.name]


@every_kind
def test_rows_name_their_pictures(kind: Kind) -> None:
    data = benchmark_several(kind.name, prompts=16)
    assert [row["question_id"] for row in data.rows] == list(range(1, len(data.rows) + 1))
    assert len(data.names) == 16 and {row["task"] for row in data.rows} == set(kind.tasks)
    assert len({(prompt_name(row), row["task"]) for row in data.rows}) == len(data.rows)
    for row in data.rows:
        shown = ["video"] if kind.video else ["images"]
        assert list(row) == ["question_id", *shown, "text", "label", "task"]
        if not kind.video:
            assert row["images"] == [f"{prompt_name(row)}_{place}.png" for place in (1, 2)]
    pictures = data.pictures(data.names[0])
    assert [picture.size for picture in pictures] == [kind.world.size[::-1]] * kind.pictures
    assert len(data.boxes(data.names[0])) == kind.pictures


@every_kind
def test_yes_and_no_are_even_over_the_prompts(kind: Kind) -> None:
    data = benchmark_several(kind.name, prompts=40)
    for task in {"same", "exist", "still"} & set(kind.tasks):
        labels = [row["label"] for row in data.rows if row["task"] == task]
        assert labels.count("yes") == labels.count("no") == 20


@every_kind
def test_questions_do_not_depend_on_what_else_is_asked(kind: Kind) -> None:
    whole, alone = benchmark_several(kind.name, prompts=6), benchmark_several(kind.name, tasks=("loc",), prompts=6)
    same = [row for row in whole.rows if row["task"] == "loc"]
    assert [{**row, "question_id": 0} for row in alone.rows] == [{**row, "question_id": 0} for row in same]
    for name in alone.names:
        for mine, other in zip(alone.pictures(name), whole.pictures(name), strict=True):
            assert mine.tobytes() == other.tobytes()


@every_kind
def test_training_and_splits_share_no_picture(kind: Kind) -> None:
    seen = {image.tobytes() for prompt in several_batch(kind, 0, 0, 8).pixels for image in prompt}
    for split in SPLITS:
        part = benchmark_several(kind.name, split, ("loc",), 8)
        mine = {picture.tobytes() for name in part.names for picture in part.pictures(name)}
        assert len(mine) == 8 * kind.pictures and not mine & seen
        seen |= mine


@every_kind
def test_save_writes_pictures_questions_and_hash(kind: Kind, tmp_path: Path) -> None:
    data = benchmark_several(kind.name, prompts=2)
    data.save(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert rows == data.rows
    about = json.loads((tmp_path / "scenes.json").read_text())
    assert (about["kind"], about["world"], about["sha256"]) == (kind.name, kind.world.name, data.sha256)
    for name in data.names:
        for place, picture in enumerate(data.pictures(name), start=1):
            saved = Image.open(tmp_path / "images" / f"{name}_{place}.png")
            assert np.array_equal(np.array(saved), np.array(picture))
    assert len(list((tmp_path / "images").iterdir())) == 2 * kind.pictures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pair"}, "kind='pair'; expected one of images, video"),
        ({"split": "train"}, "split='train'"),
        ({"tasks": ("moved",)}, "moved"),
        ({"kind": "video", "tasks": ("same",)}, "same"),
        ({"kind": "long-video", "tasks": ("digits",)}, "digits"),
        ({"tasks": ()}, "tasks="),
        ({"tasks": ("loc", "loc")}, "different"),
        ({"prompts": 0}, "prompts=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        benchmark_several(**arguments)


def test_malformed_names_are_refused() -> None:
    data = benchmark_several(prompts=1)
    for name in ("images_1", "video_000001", "images_00000x", "images_000001_1.png"):
        with pytest.raises(KeyError, match="not a prompt's name"):
            data.pictures(name)


def test_no_torch_for_the_benchmark() -> None:
    code = (
        "import sys; from vlmattn.scenes.several_splits import benchmark_several as b; b(prompts=1).sha256;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
