"""Measure a scenes model: ``python -m vlmattn.scenes.measure --model scenes-llava --questions 400 --seed 2026``.

Accuracy per task by real batched ``generate``, false yes answers per POPE category, hallucination in captions, and what
pruning visual tokens at random costs, before the decoder and after a third of its layers. Draw a seed that nobody has
looked at.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmattn

from . import card
from .library import names, path
from .questions import EXISTENCE_TASKS, PAIR_TASKS
from .splits import SceneSet, benchmark
from .text import ASSISTANT_ID, BOS_ID, EOS_ID, USER_ID, encode
from .versions import VERSION_1, VERSION_2, VERSIONS, Version
from .world import COLOR_NAMES, PARTNER, SHAPE_NAMES, Scene, type_index

Row = dict[str, Any]
SHORT_TASKS = ("color", "shape", "cell", "loc", "rel", "count", "digits")
LATER_SHORT_TASKS = (*SHORT_TASKS, "next", *PAIR_TASKS)
"""Of the later versions."""
PRUNED_TASKS = ("exist-yes", "exist-random", "color", "cell", "loc", "rel", "digits")
KEEP = 0.11
"""Share of visual tokens that random pruning keeps: 16 of 144."""
DEEP_TASKS = ("loc", "cell", "digits")
FLOORS = {
    VERSION_1.name: {
        "existence yes": 0.90,
        "existence no, random": 0.93,
        "color": 0.90,
        "shape": 0.85,
        "cell": 0.87,
        "loc": 0.90,
        "rel": 0.90,
        "digits": 0.90,
        "caption recall": 0.75,
        "caption CHAIR_s": 0.12,
        "false yes, adversarial minus random": 0.03,
        "loss of loc by random pruning": 0.10,
        "loss of cell by random pruning": 0.10,
        "loss of digits by random pruning": 0.10,
    },
    VERSION_2.name: {
        "existence yes": 0.93,
        "existence no, random": 0.96,
        "color": 0.93,
        "shape": 0.88,
        "cell": 0.90,
        "loc": 0.93,
        "rel": 0.93,
        "digits": 0.93,
        "caption recall": 0.80,
        "caption CHAIR_s": 0.12,
        "false yes, adversarial minus random": 0.04,
        "loss of loc by random pruning": 0.10,
        "loss of cell by random pruning": 0.10,
        "loss of digits by random pruning": 0.10,
        "largest loss by random pruning after a third of the layers": 0.05,
    },
}
"""What a shipped model of a version must at least reach; the hallucination rows are floors too, for without it there is
nothing to reduce."""


def _batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def chat_prompt(processor: Any, question: str) -> str:
    """The chat template's text for one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate_answers(model: Any, processor: Any, scenes: SceneSet, rows: list[Row], batch: int = 50) -> list[str]:
    """Greedy answers to rows of a set, one string per row, without special tokens."""
    answers: list[str] = []
    for part in _batches(rows, batch):
        prompts = [chat_prompt(processor, row["text"]) for row in part]
        images = [scenes.image(row["image"]) for row in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            output = model.generate(**inputs)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.inference_mode()
def pruned_correct(
    model: Any, processor: Any, scenes: SceneSet, rows: list[Row], keep: float, seed: int, batch: int = 50
) -> list[bool]:
    """Whether the greedy answer is right when a random share ``keep`` of the visual tokens enters the decoder.

    Kept tokens keep their positions. The answer is teacher-forced: it equals the greedy one exactly if every token of
    it is the most likely one.
    """
    core = model.model
    draw = torch.Generator().manual_seed(seed)
    right: dict[int, bool] = {}
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(len(_prompt(row)) + len(encode(row["label"])), []).append(row)
    for part in (part for group in by_length.values() for part in _batches(group, batch)):
        images = [scenes.image(row["image"]) for row in part]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.dtype)
        visual = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        words = torch.tensor([[*_prompt(row), *encode(row["label"])] for row in part])
        opening = words[:, :2]
        order = torch.rand(len(part), visual.shape[1], generator=draw).argsort(1)
        kept = order[:, : int(visual.shape[1] * keep + 0.5)].sort(1).values
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        embed = core.language_model.embed_tokens
        x = torch.cat((embed(opening), visual, embed(words[:, 2:])), 1)
        after = torch.arange(words.shape[1] - 2) + 2 + order.shape[1]
        positions = torch.cat((torch.arange(2).expand(len(part), -1), kept + 2, after.expand(len(part), -1)), 1)
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        mask = mask.expand(len(part), 1, -1, -1)
        hidden = core.language_model(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)[0]
        guesses = model.lm_head(hidden).argmax(-1)
        for row, guess in zip(part, guesses.tolist(), strict=True):
            answer = [*encode(row["label"]), EOS_ID]
            right[id(row)] = guess[-len(answer) :] == answer
    return [right[id(row)] for row in rows]


def _prompt(row: Row) -> list[int]:
    """Token ids of a row's prompt without the visual tokens."""
    return [BOS_ID, USER_ID, *encode(row["text"]), ASSISTANT_ID]


def mentioned_types(text: str) -> list[int]:
    """Object types that a caption names, in order, with repetitions."""
    words = text.replace(",", " ").replace(".", " ").split()
    pairs = pairwise(words)
    return [type_index(color, shape) for color, shape in pairs if color in COLOR_NAMES and shape in SHAPE_NAMES]


def caption_scores(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """CHAIR of captions (Rohrbach et al., 2018): share of wrong objects (``chair_i``) and of captions with one
    (``chair_s``), share of captions that name the absent partner of a present object, and recall of objects."""
    named = wrong = with_wrong = with_partner = found = present = 0
    for text, scene in zip(captions, scenes, strict=True):
        types = mentioned_types(text)
        extra = [kind for kind in types if kind not in scene.types]
        named, wrong = named + len(types), wrong + len(extra)
        with_wrong += bool(extra)
        with_partner += any(int(PARTNER[kind]) in scene.types for kind in extra)
        found, present = found + len(set(types) & set(scene.types)), present + len(scene.types)
    count = len(captions)
    return {
        "n": count,
        "chair_i": round(wrong / max(named, 1), 4),
        "chair_s": round(with_wrong / count, 4),
        "absent_partner_s": round(with_partner / count, 4),
        "recall": round(found / present, 4),
        "objects_per_caption": round(named / count, 2),
    }


def _accuracy(right: list[bool]) -> dict[str, float]:
    return {"n": len(right), "accuracy": round(sum(right) / len(right), 4)}


def _existence(scenes: SceneSet, count: int) -> dict[str, list[Row]]:
    """``count`` questions whose answer is yes, and as many no questions of each category."""
    yes = [row | {"task": "exist-yes"} for row in scenes.rows if row["task"] == EXISTENCE_TASKS[0]]
    groups = {"exist-yes": [row for row in yes if row["label"] == "yes"][:count]}
    for task in EXISTENCE_TASKS:
        groups[task] = [row for row in scenes.rows if row["task"] == task and row["label"] == "no"][:count]
    return groups


def measure(model: Any, processor: Any, questions: int, seed: int, version: Version) -> dict[str, Any]:
    """All measures of a model on the split ``test`` (and captions on ``typical``).

    Args:
        model: a scenes model in evaluation mode.
        processor: its processor.
        questions: questions per task; yes and no of existence count as one task each.
        seed: seed of the split; 0 is the published set, so take another one.
        version: of the model.

    Returns:
        A JSON-able dict with ``version``, ``tasks``, ``existence``, ``captions``, ``pruned``, ``deep`` and ``floors``.
    """
    short = SHORT_TASKS if version is VERSION_1 else LATER_SHORT_TASKS
    world = version.world.name
    existence_set = benchmark("test", EXISTENCE_TASKS, questions, seed, world)
    sets = {task: benchmark("test", (task,), questions, seed, world) for task in short}
    groups = _existence(existence_set, questions) | {task: sets[task].rows[:questions] for task in short}
    before_layer = model.config.text_config.num_hidden_layers // 3
    tasks, pruned, deep = {}, {}, {}
    for task, rows in groups.items():
        scenes = sets.get(task, existence_set)
        tasks[task] = _accuracy(_right(model, processor, scenes, rows))
        if task in PRUNED_TASKS:
            pruned[task] = _accuracy(pruned_correct(model, processor, scenes, rows, KEEP, seed))
        if task in DEEP_TASKS:
            with vlmattn.wrap(model, f"random(keep={KEEP}, before_layer={before_layer})"):
                deep[task] = _accuracy(_right(model, processor, scenes, rows))
    captions = {}
    for split in ("test", "typical"):
        scenes = benchmark(split, ("caption",), questions, seed, world)
        texts = generate_answers(model, processor, scenes, scenes.rows)
        captions[split] = caption_scores(texts, [scenes.scene(row["image"]) for row in scenes.rows])
    result = {"version": version.name, "tasks": tasks, "existence": _pope(tasks), "captions": captions}
    result |= {"pruned": {"keep": KEEP, **pruned}, "deep": {"keep": KEEP, "before_layer": before_layer, **deep}}
    return result | {"floors": check_floors(result, FLOORS[version.name])}


def _right(model: Any, processor: Any, scenes: SceneSet, rows: list[Row]) -> list[bool]:
    """Whether the greedy answer to each row is its label."""
    answers = generate_answers(model, processor, scenes, rows)
    return [answer == row["label"] for answer, row in zip(answers, rows, strict=True)]


def _pope(tasks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Accuracy, recall and false yes of each category on equally many yes and no questions."""
    recall = tasks["exist-yes"]["accuracy"]
    table = {}
    for task in EXISTENCE_TASKS:
        false_yes = round(1 - tasks[task]["accuracy"], 4)
        precision = recall / max(recall + false_yes, 1e-9)
        table[task.removeprefix("exist-")] = {
            "accuracy": round((recall + 1 - false_yes) / 2, 4),
            "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4),
            "false_yes": false_yes,
        }
    return table


def check_floors(result: dict[str, Any], floors: dict[str, float]) -> list[dict[str, Any]]:
    """Each floor with its measured value and whether it is met."""
    tasks, pruned, deep = result["tasks"], result["pruned"], result["deep"]
    values = {task: tasks[task]["accuracy"] for task in SHORT_TASKS}
    values["existence yes"] = tasks["exist-yes"]["accuracy"]
    values["existence no, random"] = tasks["exist-random"]["accuracy"]
    values["caption recall"] = result["captions"]["test"]["recall"]
    values["caption CHAIR_s"] = result["captions"]["test"]["chair_s"]
    existence = result["existence"]
    gap = existence["adversarial"]["false_yes"] - existence["random"]["false_yes"]
    values["false yes, adversarial minus random"] = gap
    for task in DEEP_TASKS:
        values[f"loss of {task} by random pruning"] = tasks[task]["accuracy"] - pruned[task]["accuracy"]
    lost = [tasks[task]["accuracy"] - deep[task]["accuracy"] for task in DEEP_TASKS]
    values["largest loss by random pruning after a third of the layers"] = max(lost)
    return [
        {"name": name, "value": round(values[name], 4), "floor": floor, "met": values[name] >= floor - 1e-9}
        for name, floor in floors.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line of :func:`measure`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.measure",
        description="Accuracy per task, hallucination and the price of random pruning, on freshly drawn scenes.",
    )
    parser.add_argument("--model", required=True, help=f"a folder, or one of {', '.join(names())}")
    parser.add_argument("--questions", type=int, default=400, help="questions per task (default %(default)s)")
    parser.add_argument("--seed", type=int, required=True, help="seed of the split; take one nobody has looked at")
    parser.add_argument(
        "--card", action="store_true", help="also write measured.json and MODEL_CARD.md into the folder"
    )
    options = parser.parse_args(arguments)
    folder = path(options.model) if options.model in names() else Path(options.model)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    started = time.monotonic()
    record = folder / card.TRAINING_FILE
    settings = json.loads(record.read_text())["settings"] if record.exists() else {}
    version = VERSIONS[settings.get("version", VERSION_1.name)]
    result = measure(model, processor, options.questions, options.seed, version)
    command = f"python -m vlmattn.scenes.measure --model {shlex.quote(folder.name)}"
    result["command"] = f"{command} --questions {options.questions} --seed {options.seed}"
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(card.measured_tables(result))
    print(f"{time.monotonic() - started:.0f} s")
    if options.card:
        (folder / card.MEASURED_FILE).write_text(json.dumps(result, indent=1) + "\n")
        card.write(folder)


if __name__ == "__main__":
    main()
