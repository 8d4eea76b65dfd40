"""The packaged models: each loads offline, answers as recorded, and meets its floors on fresh scenes.

After a new checkpoint, ``python tests/test_scenes_model.py NAME`` writes its golden file anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vlmattn import scenes
from vlmattn.errors import DataError
from vlmattn.scenes import card, figures, measure
from vlmattn.scenes.library import DERIVED, recorded_version
from vlmattn.scenes.measure import (
    ANSWER_TOKENS,
    DEEP_TASKS,
    FLOORS,
    SHORT_TASKS,
    caption_scores,
    chat_prompt,
    generate_answers,
    mentioned_types,
    random_pruning,
    right_answers,
)
from vlmattn.scenes.questions import EXISTENCE_TASKS
from vlmattn.scenes.splits import ALL_TASKS, SPLITS, benchmark
from vlmattn.scenes.text import encode
from vlmattn.scenes.versions import VERSIONS
from vlmattn.scenes.world import PARTNER, random_state, sample_scene, type_name

NAMES = [name for name in scenes.names() if name not in DERIVED]
BASE = "scenes-llava"
GOLDEN_TASKS = ("exist-random", "color", "shape", "cell", "loc", "rel", "digits", "caption")
FRESH_SEED = 4242
QUESTIONS = 100
MARGIN = 0.05
"""About twice the standard error at 100 questions and an accuracy near .93."""
MOST_BYTES = 15e6
"""Of the weights of a packaged model."""


class Packaged(NamedTuple):
    """A model of the package, its processor and the world that it was trained on."""

    name: str
    model: Any
    processor: Any
    world: str

    @property
    def floors(self) -> dict[str, float]:
        return FLOORS[scenes.version(self.name).name]

    def fresh(self, *tasks: str, images: int = QUESTIONS) -> scenes.SceneSet:
        return benchmark("test", tasks, images, FRESH_SEED, self.world)


@pytest.fixture(scope="module", params=NAMES)
def packaged(request: pytest.FixtureRequest) -> Packaged:
    return load(request.param)


def load(name: str) -> Packaged:
    return Packaged(name, *scenes.load(name), scenes.version(name).world.name)


def golden_file(name: str) -> Path:
    return Path(__file__).parent / "data" / f"golden_{name}.json"


def golden_rows(world: str) -> tuple[scenes.SceneSet, list[dict[str, Any]]]:
    """One question of each golden task, each about another picture of the published test set."""
    whole = benchmark("test", GOLDEN_TASKS, 40, world=world)
    rows: list[dict[str, Any]] = []
    for task in GOLDEN_TASKS:
        used = {row["image"] for row in rows}
        rows.append(next(row for row in whole.rows if row["task"] == task and row["image"] not in used))
    return whole, rows


def last_logits(packaged: Packaged, picture: Any, question: str) -> torch.Tensor:
    prompt = chat_prompt(packaged.processor, question)
    inputs = packaged.processor(images=[picture], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        return packaged.model(**inputs).logits[0, -1]


def test_names_and_path() -> None:
    assert BASE in NAMES
    assert all(scenes.path(name).is_dir() for name in NAMES)
    with pytest.raises(DataError, match=r"scenes-llama.*scenes-llava"):
        scenes.path("scenes-llama")


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"settings": {"version": "0"}}'])
def test_a_folder_without_a_known_version_is_named(tmp_path: Path, record: str | None) -> None:
    if record is not None:
        (tmp_path / "training.json").write_text(record)
    with pytest.raises(DataError, match=r"training\.json: no training record of a known version \(2, qwen\)"):
        recorded_version(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_loads_offline_in_a_fresh_process_without_a_warning(name: str) -> None:
    folder = scenes.path(name)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from transformers import AutoModelForImageTextToText\n"
        "from vlmattn import scenes\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r})\n"
        f"assert type(model).__name__ == {architecture!r} and str(model.dtype) == 'torch.bfloat16'\n"
        f"model, processor = scenes.load({name!r})\n"
        f"assert type(model).__name__ == {architecture!r} and type(processor).__name__.endswith('Processor')\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert noise == []


def test_load_gives_an_evaluation_model_of_the_wanted_dtype(packaged: Packaged) -> None:
    model = packaged.model
    assert not model.training and model.dtype == torch.float32
    assert model.config.get_text_config().rope_parameters["rope_theta"] == 1e6
    half, _ = scenes.load(packaged.name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_package_is_small_and_its_card_names_the_weights(name: str) -> None:
    folder, floors = scenes.path(name), FLOORS[scenes.version(name).name]
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < MOST_BYTES
    assert sum(file.stat().st_size for file in folder.iterdir()) < weights.stat().st_size + 0.5e6
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    text = (folder / "MODEL_CARD.md").read_text()
    assert digest in text and json.loads((folder / "training.json").read_text())["weights_sha256"] == digest
    assert "never results on real VLMs" in text and "apache-2.0" in text
    for linked in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / linked).read_bytes().startswith(b"\x89PNG")
    measured = json.loads((folder / "measured.json").read_text())
    assert {floor["name"] for floor in measured["floors"]} == set(floors)
    for floor in measured["floors"]:
        assert floor["met"] == (floor["value"] >= floor["floor"] - 1e-9)
        assert f"| {floor['name']} | {floor['value']:.3f} |" in text


def test_golden_logits_and_answers(packaged: Packaged) -> None:
    whole, rows = golden_rows(packaged.world)
    golden = json.loads(golden_file(packaged.name).read_text())
    assert [(row["image"], row["text"]) for row in rows] == [(item["image"], item["text"]) for item in golden]
    for row, item in zip(rows, golden, strict=True):
        logits = last_logits(packaged, whole.image(row["image"]), row["text"])
        assert (logits - torch.tensor(item["logits"])).abs().max() < 1e-3, row["text"]
    assert generate_answers(packaged.model, packaged.processor, whole, rows) == [item["answer"] for item in golden]


def test_one_by_one_equals_a_padded_batch_in_any_order(packaged: Packaged) -> None:
    whole, rows = golden_rows(packaged.world)
    alone = [generate_answers(packaged.model, packaged.processor, whole, [row])[0] for row in rows]
    assert alone == generate_answers(packaged.model, packaged.processor, whole, rows)
    assert alone[::-1] == generate_answers(packaged.model, packaged.processor, whole, rows[::-1], batch=3)


@pytest.mark.parametrize("world", [version.world.name for version in VERSIONS.values()])
def test_no_answer_is_cut_off(world: str) -> None:
    for split in SPLITS:
        rows = benchmark(split, ALL_TASKS, 60, FRESH_SEED, world).rows
        assert max(len(encode(row["label"])) for row in rows if row["task"] != "caption") < ANSWER_TOKENS


@pytest.mark.parametrize("task", [task for task in SHORT_TASKS if task in FLOORS["2"]])
def test_floor_of_a_task(packaged: Packaged, task: str) -> None:
    fresh = packaged.fresh(task)
    right = right_answers(packaged.model, packaged.processor, fresh, fresh.rows)
    assert sum(right) / len(right) >= packaged.floors[task] - MARGIN
    if task in DEEP_TASKS:
        few = right_answers(packaged.model, packaged.processor, fresh, fresh.rows, random_pruning(before_layer=0))
        assert (sum(right) - sum(few)) / len(right) >= packaged.floors[f"loss of {task} by random pruning"]


def test_floors_of_existence_and_the_prior(packaged: Packaged) -> None:
    fresh = packaged.fresh("exist-random", "exist-adversarial", images=110)
    right = right_answers(packaged.model, packaged.processor, fresh, fresh.rows)

    def share(task: str, label: str) -> float:
        hits = [ok for ok, row in zip(right, fresh.rows, strict=True) if (row["task"], row["label"]) == (task, label)]
        return sum(hits) / len(hits)

    assert share("exist-random", "yes") >= packaged.floors["existence yes"] - MARGIN
    assert share("exist-random", "no") >= packaged.floors["existence no, random"] - MARGIN
    assert share("exist-random", "no") > share("exist-adversarial", "no")


def test_captions_find_objects_and_hallucinate_partners(packaged: Packaged) -> None:
    fresh = packaged.fresh("caption")
    texts = generate_answers(packaged.model, packaged.processor, fresh, fresh.rows)
    scores = caption_scores(texts, [fresh.scene(row["image"]) for row in fresh.rows])
    assert scores["recall"] >= packaged.floors["caption recall"] - MARGIN
    assert scores["chair_s"] >= packaged.floors["caption CHAIR_s"] - MARGIN
    assert scores["absent_partner_s"] > 0


def test_caption_scores_by_hand() -> None:
    scene = next(
        drawn
        for drawn in (sample_scene(random_state(909, number), partner=0.0) for number in range(99))
        if len(drawn.objects) == 2 and PARTNER[drawn.types[0]] >= 0
    )
    first, second = (type_name(kind) for kind in scene.types)
    partner = type_name(int(PARTNER[scene.types[0]]))
    assert mentioned_types(f"a {first}, a {partner}.") == [scene.types[0], int(PARTNER[scene.types[0]])]
    scores = caption_scores([f"a {first}, a {partner}.", f"a {first}, a {second}."], [scene, scene])
    expected = {"n": 2, "chair_i": 0.25, "chair_s": 0.5, "absent_partner_s": 0.5, "recall": 0.75}
    assert {key: scores[key] for key in expected} == expected


def made_up(accuracy: float) -> dict[str, Any]:
    """A result in which every task has one accuracy, half of it with few visual tokens."""
    tasks = {task: {"n": 9, "accuracy": accuracy} for task in ("exist-yes", *EXISTENCE_TASKS, *SHORT_TASKS)}
    half = {task: {"n": 9, "accuracy": accuracy / 2} for task in DEEP_TASKS}
    largest = {"largest": 3.0, "ratio": 12.0, "dimension": 5, "agreeing": 0.5, "token": "<bos>"}
    attention = {"visual": [0.2, 0.4], "visual_last": [0.1, 0.1], "first": [0.3, 0.5], "most": 0.25}
    caption = {"n": 9, "chair_i": 0.1, "chair_s": 0.2, "absent_partner_s": 0.1, "recall": accuracy}
    return {
        "split": "test",
        "command": "measure",
        "tasks": tasks,
        "existence": {"random": {"accuracy": accuracy, "f1": accuracy, "false_yes": 1 - accuracy}},
        "captions": {"test": caption, "typical": caption | {"recall": 0.0}},
        "pruned": {"keep": 0.1, **half},
        "deep": {"keep": 0.1, "before_layer": 4, **half},
        "statistics": {
            "questions": 9,
            "attention": [attention] * 2,
            "activations": [{"median": 0.25, "first": largest}] * 2,
        },
    }


def test_floors_by_hand() -> None:
    result = made_up(0.94)
    result["tasks"]["exist-adversarial"]["accuracy"] = 0.9
    result["deep"]["cell"] = {"n": 9, "accuracy": 0.2}
    floors = {f["name"]: f for f in measure.check_floors(result, FLOORS["2"])}
    assert list(floors) == list(FLOORS["2"])
    assert floors["largest loss by random pruning after a third of the layers"]["value"] == pytest.approx(0.74)
    assert floors["loss of loc by random pruning"]["value"] == pytest.approx(0.47)
    assert floors["false yes, adversarial minus random"]["met"] and floors["caption CHAIR_s"]["met"]
    assert floors["caption recall"]["value"] == pytest.approx(0.94)
    assert not floors["existence no, random"]["met"] and floors["existence yes"]["met"]
    only = {"split": "val", "tasks": {"loc": {"accuracy": 0.5}}, "captions": {}, "pruned": {}, "deep": {}}
    assert [(f["name"], f["met"]) for f in measure.check_floors(only, FLOORS["2"])] == [("loc", False)]


def test_the_card_speaks_of_version_share_and_seeds_and_its_pictures_never_change(tmp_path: Path) -> None:
    shutil.copy(scenes.path(BASE) / "config.json", tmp_path)
    training = json.loads((scenes.path(BASE) / "training.json").read_text())
    training |= {"habit_share": 0.7, "choice": {}, "abandoned": {"10": training["curve"][:9]}}
    measured = made_up(0.123)
    measured["floors"] = measure.check_floors(measured, FLOORS["2"])
    (tmp_path / "training.json").write_text(json.dumps(training))
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    card.write(tmp_path)
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "12 layers and 4 heads of 32, 2 of them for keys and values" in text and "4x4 cells" in text
    assert "genuine `LlavaForConditionalGeneration` (CLIP tower with class token" in text
    assert "before layer 4" in text and "| loc | 0.123 | 0.061 | 9 |" in text
    assert "| 1 | 0.30 | 0.40 | 0.10 | 0.40 | 0.25 |" in text and "| 1 | 0.250 | 12 (dim 5, 50%) |" in text
    assert "before + 0.7 * (after - before), a\nshare that was given" in text and "a plateau: 10." in text
    training["choice"] = {"habit_share": 0.7, "good_share": True}
    (tmp_path / "training.json").write_text(json.dumps(training))
    card.write(tmp_path)
    assert "the\nsmallest share with enough hallucination" in (tmp_path / "MODEL_CARD.md").read_text()
    figures.write(tmp_path)
    first = (tmp_path / card.CURVE_FILE).read_bytes()
    figures.write(tmp_path)
    assert first.startswith(b"\x89PNG") and (tmp_path / card.CURVE_FILE).read_bytes() == first


def test_every_existence_category_is_known_to_the_measure() -> None:
    assert set(EXISTENCE_TASKS) == {f"exist-{name}" for name in ("random", "popular", "adversarial", "binding")}


def write_golden(name: str) -> None:
    packaged = load(name)
    whole, rows = golden_rows(packaged.world)
    answers = generate_answers(packaged.model, packaged.processor, whole, rows)
    golden = []
    for row, answer in zip(rows, answers, strict=True):
        logits = last_logits(packaged, whole.image(row["image"]), row["text"])
        rounded = [round(value, 5) for value in logits.tolist()]
        golden.append({"image": row["image"], "text": row["text"], "answer": answer, "logits": rounded})
    golden_file(name).write_text("[\n" + ",\n".join(json.dumps(item) for item in golden) + "\n]\n")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or NAMES:
        write_golden(wanted)
