"""Measuring prompts with several pictures through the stock model and the real processor, and what the card says."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scenes_model import made_up
from test_scenes_qwen import VERSION
from test_scenes_several_training import TINY

from vlmattn.scenes import card, figures, measure, several_measure
from vlmattn.scenes.export import save_processor
from vlmattn.scenes.library import load_processor
from vlmattn.scenes.model import PackedForward, build_model, packed_inputs
from vlmattn.scenes.several_kinds import KINDS, Kind
from vlmattn.scenes.several_measure import measure_several, several_answers, several_chat_prompt
from vlmattn.scenes.several_packing import pack_several
from vlmattn.scenes.several_splits import SeveralSet, benchmark_several
from vlmattn.scenes.text import WORDS

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(VERSION, seed=3).eval()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    save_processor(VERSION, folder)
    return load_processor(folder)


@every_kind
def test_training_prompts_are_those_of_the_stock_model_and_its_processor(
    model: Any, processor: Any, kind: Kind
) -> None:
    """Logits in front of the answer, for the first and the last question of a training sample."""
    rng, prompt = kind.sample(102, 5, 1)
    pixels = prompt.render(rng)[0]
    packed = pack_several(rng, prompt, kind.course)
    inputs, groups = packed_inputs(pixels[None], kind, torch.float32)
    lengths = [length for slots, length in kind.course.slot_groups for _ in range(slots)]
    starts = [0, *accumulate(lengths)]
    shown = {"videos": [list(pixels)]} if kind.video else {"images": list(pixels)}
    with torch.no_grad():
        logits, _ = PackedForward(model, VERSION)(inputs, torch.from_numpy(packed.ids)[None], slot_groups=groups)
        for slot in (packed.slots[0], packed.slots[-1]):
            start = max(at for at in starts if at < slot.answer)
            question = " ".join(WORDS[word] for word in packed.ids[start : slot.answer - 1])
            text = several_chat_prompt(processor, kind, question)
            stock = model(**processor(text=[text], **shown, return_tensors="pt")).logits
            assert (stock[0, -1] - logits[0, slot.answer - 1]).abs().max() < 1e-5


@every_kind
def test_answers_do_not_depend_on_the_batch(model: Any, processor: Any, kind: Kind) -> None:
    """Of questions of several lengths about several prompts, padded together or asked alone."""
    data = benchmark_several(kind.name, tasks=("loc", "rel", "changed"), prompts=3)
    together = several_answers(model, processor, data, data.rows, batch=4)
    alone = [several_answers(model, processor, data, [row])[0] for row in data.rows]
    assert together == alone and len(set(alone)) > 1


def test_accuracy_is_counted_by_kind_and_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that always says no, and is right about the first prompt."""
    first: dict[str, SeveralSet] = {}

    def answers(model: Any, processor: Any, data: SeveralSet, rows: list[dict[str, Any]]) -> list[str]:
        first[data.kind.name] = data
        name = data.names[0]
        return [row["label"] if several_measure.prompt_name(row) == name else "no" for row in rows]

    monkeypatch.setattr(several_measure, "several_answers", answers)
    found = measure_several(None, None, 8, seed=4)
    assert list(found) == list(KINDS)
    for name, tasks in found.items():
        data = first[name]
        assert (data.split, data.seed, len(data.names)) == ("test", 4, 8)
        asked = [row["task"] for row in data.rows]
        assert {task: line["n"] for task, line in tasks.items()} == {task: asked.count(task) for task in tasks}
        assert set(tasks) == set(asked) and tasks["loc"] == {"n": 8, "accuracy": 0.125}
        assert 0.4 < tasks["exist"]["accuracy"] < 0.7


def recorded(folder: Path, several_steps: int) -> dict[str, Any]:
    """Write what a card needs into a folder; returns its measured part."""
    lines = [{"stage": "joint", "step": 6, "seconds": 9.0, "loss": 1.0, "loc": 0.5}]
    kinds = {"images": {"same": 0.25, "loc": 0.75}, "video": {"moved": 0.125}}
    lines += [lines[0] | {"stage": "several", "step": step} | kinds for step in (2, 4)] if several_steps else []
    settings = {k: v for k, v in asdict(TINY).items() if several_steps or k != "several_steps"}
    training = {"settings": settings, "curve": lines, "abandoned": {}, "choice": {}, "habit_share": 1}
    training |= {"parameters": 9, "weights_sha256": "", "versions": {}}
    measured = made_up(0.5) | {"floors": []}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "measured.json").write_text(json.dumps(measured))
    return measured


def test_the_card_tells_of_several_pictures_where_there_are_some(tmp_path: Path) -> None:
    measured = recorded(tmp_path, several_steps=6)
    several = {"images": {"same": {"n": 8, "accuracy": 0.75}, "loc": {"n": 7, "accuracy": 0.5}}}
    several |= {"video": {"moved": {"n": 6, "accuracy": 0.25}, "loc": {"n": 5, "accuracy": 1.0}}}
    (tmp_path / "measured.json").write_text(json.dumps(measured | {"several": several}))
    card.write(tmp_path)
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "Then 6 steps of which every other one shows two images or a video of 4 or 8 frames.\nStage 2: 2" in text
    assert "| task | images | video |" in text and "| loc | 0.500 (7) | 1.000 (5) |" in text
    assert "| same | 0.750 (8) |  |" in text and "| moved |  | 0.250 (6) |" in text
    assert "`images` shows 2 images of 96x96, `video` shows a video of 4 frames of 96x96" in text
    assert "- One picture, two images or a short video per prompt, one turn" in text
    assert "| several | 4 | 0 | 1.00 | 0.50 |" in text and "| several, video | 4 | 0 | 1.00 | 0.12 |" in text
    drawn = figures.curve(json.loads((tmp_path / "training.json").read_text())["curve"], {})
    titles = [axes.get_title() for axes in drawn.axes if axes.get_title()]
    assert titles == ["several", "several, images", "several, video"]
    recorded(tmp_path, several_steps=0)
    card.write(tmp_path)
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "on the answers.\nStage 2: 2" in text and "- One picture per prompt, one turn" in text
    assert "video" not in text and "two images" not in text


def test_the_command_measures_them_for_a_model_that_was_trained_on_them(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    save_processor(VERSION, tmp_path)
    config = (tmp_path / "config.json").read_text()
    for name in ("_statistics", "measure"):
        made = made_up(0.5)
        found = made["statistics"] if name == "_statistics" else made | {"floors": []}
        monkeypatch.setattr(measure, name, lambda *_, found=found: dict(found))
    monkeypatch.setattr(figures, "write", lambda folder: None)
    for steps in (6, 0):
        recorded(tmp_path, steps)
        (tmp_path / "config.json").write_text(config)
        measure.main(["--model", str(tmp_path), "--seed", "1", "--prompts", "1", "--card"])
        measured = json.loads((tmp_path / "measured.json").read_text())
        assert ("--prompts 1 " in measured["command"]) == ("several" in measured) == bool(steps)
        if steps:
            assert list(measured["several"]) == list(KINDS) and measured["several"]["images"]["loc"]["n"] == 1
