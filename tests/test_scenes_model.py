"""The packaged model: loads offline, answers as recorded, and meets its floors on fresh scenes.

After a new checkpoint, ``python tests/test_scenes_model.py`` writes the golden file anew.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmattn import scenes
from vlmattn.errors import DataError
from vlmattn.scenes import card, measure
from vlmattn.scenes.measure import (
    SHORT_TASKS,
    caption_scores,
    chat_prompt,
    generate_answers,
    mentioned_types,
    pruned_correct,
)
from vlmattn.scenes.questions import EXISTENCE_TASKS
from vlmattn.scenes.world import PARTNER, random_state, sample_scene, type_name

NAME = "scenes-llava"
FLOORS = measure.FLOORS["1"]
GOLDEN = Path(__file__).parent / "data" / "scenes_golden.json"
GOLDEN_TASKS = ("exist-random", "color", "shape", "cell", "loc", "rel", "digits", "caption")
FRESH_SEED = 4242
QUESTIONS = 100
MARGIN = 0.05
"""About twice the standard error at 100 questions and an accuracy near .93."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return scenes.load(NAME)


def golden_rows() -> tuple[scenes.SceneSet, list[dict[str, Any]]]:
    """One question of each golden task, each about another picture of the published test set."""
    whole = scenes.benchmark("test", GOLDEN_TASKS, 40)
    rows: list[dict[str, Any]] = []
    for task in GOLDEN_TASKS:
        used = {row["image"] for row in rows}
        rows.append(next(row for row in whole.rows if row["task"] == task and row["image"] not in used))
    return whole, rows


def last_logits(model: Any, processor: Any, picture: Any, question: str) -> torch.Tensor:
    inputs = processor(images=[picture], text=[chat_prompt(processor, question)], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def test_names_and_path() -> None:
    assert NAME in scenes.names()
    assert scenes.path(NAME).is_dir()
    with pytest.raises(DataError, match=r"scenes-llama.*scenes-llava"):
        scenes.path("scenes-llama")


def test_loads_offline_in_a_fresh_process_without_a_warning() -> None:
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"folder = {str(scenes.path(NAME))!r}\n"
        "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "assert type(model).__name__ == 'LlavaForConditionalGeneration' and str(model.dtype) == 'torch.bfloat16'\n"
        "assert type(processor).__name__ == 'LlavaProcessor'\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert noise == []


def test_load_gives_an_evaluation_model_of_the_wanted_dtype(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert not model.training and model.dtype == torch.float32
    assert model.config.image_seq_length == 144
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6
    half, _ = scenes.load(NAME, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), half.parameters(), strict=True))


def test_package_is_small_and_its_card_names_the_weights() -> None:
    folder = scenes.path(NAME)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 4.5e6
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    text = (folder / "MODEL_CARD.md").read_text()
    assert digest in text and json.loads((folder / "training.json").read_text())["weights_sha256"] == digest
    assert "never results on real VLMs" in text and "apache-2.0" in text
    measured = json.loads((folder / "measured.json").read_text())
    assert {floor["name"] for floor in measured["floors"]} == set(FLOORS)
    for floor in measured["floors"]:
        assert floor["met"] == (floor["value"] >= floor["floor"] - 1e-9)
        assert f"| {floor['name']} | {floor['value']:.3f} |" in text


def test_golden_logits_and_answers(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    whole, rows = golden_rows()
    golden = json.loads(GOLDEN.read_text())
    assert [(row["image"], row["text"]) for row in rows] == [(item["image"], item["text"]) for item in golden]
    for row, item in zip(rows, golden, strict=True):
        logits = last_logits(model, processor, whole.image(row["image"]), row["text"])
        assert (logits - torch.tensor(item["logits"])).abs().max() < 1e-3, row["text"]
    assert generate_answers(model, processor, whole, rows) == [item["answer"] for item in golden]


def test_one_by_one_equals_a_padded_batch(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    whole, rows = golden_rows()
    alone = [generate_answers(model, processor, whole, [row])[0] for row in rows]
    assert alone == generate_answers(model, processor, whole, rows)


def test_teacher_forcing_equals_generate(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    whole = scenes.benchmark("test", ("cell", "count", "digits"), 12, FRESH_SEED)
    answers = generate_answers(model, processor, whole, whole.rows)
    right = [answer == row["label"] for answer, row in zip(answers, whole.rows, strict=True)]
    assert pruned_correct(model, processor, whole, whole.rows, keep=1.0, seed=0) == right


@pytest.mark.parametrize("task", [task for task in SHORT_TASKS if task in FLOORS])
def test_floor_of_a_task(loaded: tuple[Any, Any], task: str) -> None:
    model, processor = loaded
    fresh = scenes.benchmark("test", (task,), QUESTIONS, FRESH_SEED)
    right = pruned_correct(model, processor, fresh, fresh.rows, keep=1.0, seed=0)
    assert sum(right) / len(right) >= FLOORS[task] - MARGIN
    if task in ("loc", "cell", "digits"):
        few = pruned_correct(model, processor, fresh, fresh.rows, keep=0.11, seed=0)
        assert (sum(right) - sum(few)) / len(right) >= FLOORS[f"loss of {task} by random pruning"]


def test_floors_of_existence_and_the_prior(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    fresh = scenes.benchmark("test", ("exist-random", "exist-adversarial"), 110, FRESH_SEED)
    right = pruned_correct(model, processor, fresh, fresh.rows, keep=1.0, seed=0)

    def share(task: str, label: str) -> float:
        hits = [ok for ok, row in zip(right, fresh.rows, strict=True) if (row["task"], row["label"]) == (task, label)]
        return sum(hits) / len(hits)

    assert share("exist-random", "yes") >= FLOORS["existence yes"] - MARGIN
    assert share("exist-random", "no") >= FLOORS["existence no, random"] - MARGIN
    assert share("exist-random", "no") > share("exist-adversarial", "no")


def test_captions_find_objects_and_hallucinate_partners(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    fresh = scenes.benchmark("test", ("caption",), QUESTIONS, FRESH_SEED)
    texts = generate_answers(model, processor, fresh, fresh.rows)
    scores = caption_scores(texts, [fresh.scene(row["image"]) for row in fresh.rows])
    assert scores["recall"] >= FLOORS["caption recall"] - MARGIN
    assert scores["chair_s"] >= FLOORS["caption CHAIR_s"] - MARGIN
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


def test_floors_of_the_second_version_include_pruning_inside_the_decoder() -> None:
    measured = json.loads((scenes.path(NAME) / "measured.json").read_text())
    deep = {task: {"n": 9, "accuracy": 0.9} for task in measure.DEEP_TASKS}
    floors = {f["name"]: f for f in measure.check_floors(measured | {"deep": deep}, measure.FLOORS["2"])}
    lost = max(measured["tasks"][task]["accuracy"] for task in deep) - 0.9
    assert floors["largest loss by random pruning after a third of the layers"]["value"] == pytest.approx(lost)
    assert floors.keys() == measure.FLOORS["2"].keys() > FLOORS.keys()
    assert all(measure.FLOORS["2"][name] >= floor for name, floor in FLOORS.items())


def test_the_card_speaks_of_its_version(tmp_path: Path) -> None:
    training, measured = (json.loads((scenes.path(NAME) / f).read_text()) for f in ("training.json", "measured.json"))
    training["settings"] |= {"version": "2"}
    measured["deep"] = {"keep": 0.11, "before_layer": 4, "loc": {"n": 9, "accuracy": 0.123}}
    (tmp_path / "training.json").write_text(json.dumps(training))
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    card.write(tmp_path)
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "12 layers and 4 heads of 32, 2 of them for keys and values" in text and "4x4 cells of 24 pixels" in text
    assert "before layer 4" in text and "0.123" in text and "not measured on it" not in text


def test_every_existence_category_is_known_to_the_measure() -> None:
    assert set(EXISTENCE_TASKS) == {f"exist-{name}" for name in ("random", "popular", "adversarial", "binding")}


def write_golden() -> None:
    model, processor = scenes.load(NAME)
    whole, rows = golden_rows()
    answers = generate_answers(model, processor, whole, rows)
    golden = []
    for row, answer in zip(rows, answers, strict=True):
        logits = last_logits(model, processor, whole.image(row["image"]), row["text"])
        rounded = [round(value, 5) for value in logits.tolist()]
        golden.append({"image": row["image"], "text": row["text"], "answer": answer, "logits": rounded})
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(item) for item in golden) + "\n]\n")


if __name__ == "__main__":
    write_golden()
