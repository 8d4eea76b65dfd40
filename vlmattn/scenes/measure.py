"""Measure a scenes model: ``python -m vlmattn.scenes.measure --model scenes-llava --questions 400 --seed 2026``.

Accuracy per task by real batched ``generate``, false yes answers per POPE category, hallucination in captions, and what
pruning visual tokens at random costs, before the decoder and after a third of its layers; statistics.py adds where the
model looks and how large its activations are, and several_measure.py the accuracy on prompts with several pictures
where the model was trained on them. Draw a seed that nobody has looked at.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText

import vlmattn

from . import card, figures
from .library import load_processor, names, path, recorded_settings, recorded_version
from .questions import EXISTENCE_TASKS, PAIR_TASKS
from .splits import SceneSet, benchmark
from .statistics import statistics
from .text import encode
from .versions import VERSION_2, VERSION_QWEN, Version
from .world import COLOR_NAMES, PARTNER, SHAPE_NAMES, Scene, type_index

Row = dict[str, Any]
SHORT_TASKS = ("color", "shape", "cell", "loc", "rel", "count", "digits", "next", *PAIR_TASKS)
PRUNED_TASKS = ("exist-yes", "exist-random", "color", "cell", "loc", "rel", "digits")
KEEP = 0.11
"""Share of visual tokens that random pruning keeps: 16 of 144."""
DEEP_TASKS = ("loc", "cell", "digits")
CAPTION = "caption"
STATISTICS_TASKS, STATISTICS_PICTURES = ("cell", "loc", "color", "rel", "caption"), 20
ANSWER_TOKENS = 8
"""An answer that is no caption is shorter; a model that knows when to stop never comes to it."""
_FLOORS = {
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
}
FLOORS = {VERSION_2.name: _FLOORS, VERSION_QWEN.name: _FLOORS}
"""What a shipped model of a version must at least reach; the hallucination rows are floors too, for without it there is
nothing to reduce."""


def chat_prompt(processor: Any, question: str) -> str:
    """The chat template's text for one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate_answers(model: Any, processor: Any, scenes: SceneSet, rows: list[Row], batch: int = 50) -> list[str]:
    """Greedy answers to rows of a set, one string per row, without special tokens."""

    def inputs(part: list[Row]) -> Any:
        prompts = [chat_prompt(processor, row["text"]) for row in part]
        images = [scenes.image(row["image"]) for row in part]
        return processor(images=images, text=prompts, padding=True, return_tensors="pt")

    return greedy_answers(model, processor, inputs, rows, batch)


def greedy_answers(
    model: Any, processor: Any, prepare: Callable[[list[Row]], Any], rows: list[Row], batch: int
) -> list[str]:
    """Greedy answers to rows, one string per row, without special tokens.

    Rows are batched by the length of their prompts, so that hardly anything is padded.

    Args:
        model: a scenes model in evaluation mode.
        processor: its processor.
        prepare: makes the padded model inputs of some rows.
        rows: questions with ``text`` and ``task``.
        batch: rows per call of ``generate``.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["task"] == CAPTION, len(encode(rows[i]["text"]))))
    answers = [""] * len(rows)
    for start in range(0, len(rows), batch):
        part = order[start : start + batch]
        inputs = prepare([rows[i] for i in part]).to(model.device, model.dtype)
        limit = {} if rows[part[-1]]["task"] == CAPTION else {"max_new_tokens": ANSWER_TOKENS}
        with torch.inference_mode():
            output = model.generate(**inputs, **limit)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    return answers


def right_answers(
    model: Any,
    processor: Any,
    scenes: SceneSet,
    rows: list[Row],
    pruned: str | None = None,
    store: vlmattn.VisionStore | None = None,
) -> list[bool]:
    """Whether the greedy answer to each row is its label, with all visual tokens or under a spec that prunes some; the
    vision tower runs once for all calls with the same rows and store."""
    with vlmattn.wrap(model, pruned) as session:
        session.share_vision(store)
        answers = generate_answers(model, processor, scenes, rows)
    return [answer == row["label"] for answer, row in zip(answers, rows, strict=True)]


def random_pruning(before_layer: int, seed: int = 0) -> str:
    """The spec that keeps a random share KEEP of the visual tokens in front of a decoder layer."""
    return f"random(keep={KEEP}, before_layer={before_layer}, seed={seed})"


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


def accuracy(right: list[bool]) -> dict[str, float]:
    """Number of answers, ``n``, and the share of right ones, ``accuracy``."""
    return {"n": len(right), "accuracy": round(sum(right) / len(right), 4)}


def _rows(split: str, task: str, count: int, seed: int, version: Version) -> tuple[SceneSet, list[Row]]:
    """``count`` questions of a task: of existence those whose answer is yes, or the no questions of a category."""
    world = version.world.name
    if not task.startswith("exist-"):
        scenes = benchmark(split, (task,), count, seed, world)
        return scenes, scenes.rows[:count]
    category, label = (EXISTENCE_TASKS[0], "yes") if task == "exist-yes" else (task, "no")
    scenes = benchmark(split, (category,), count, seed, world)
    return scenes, [row | {"task": task} for row in scenes.rows if row["label"] == label][:count]


def measure(
    model: Any,
    processor: Any,
    questions: int,
    seed: int,
    version: Version,
    split: str = "test",
    only: Collection[str] = (),
) -> dict[str, Any]:
    """All measures of a model on a split, for `test` also of captions on `typical`.

    Args:
        model: a scenes model in evaluation mode.
        processor: its processor.
        questions: questions per task; yes and no of existence count as one task each.
        seed: seed of the split; 0 is the published set, so take another one.
        version: of the model.
        split: a name in ``vlmattn.scenes.splits.SPLITS``.
        only: tasks to measure, ``exist-yes`` and ``caption`` among them; none for all.

    Returns:
        A JSON-able dict with ``version``, ``split``, ``tasks``, ``existence``, ``captions``, ``pruned``, ``deep`` and
        ``floors``; without what needs tasks that were left out.
    """
    wanted = [task for task in ("exist-yes", *EXISTENCE_TASKS, *SHORT_TASKS) if not only or task in only]
    before_layer = model.config.get_text_config().num_hidden_layers // 3
    tasks, pruned, deep = {}, {}, {}
    for task in wanted:
        scenes, rows = _rows(split, task, questions, seed, version)
        ask = partial(right_answers, model, processor, scenes, rows, store=vlmattn.VisionStore())
        tasks[task] = accuracy(ask())
        if task in PRUNED_TASKS and not only:
            pruned[task] = accuracy(ask(random_pruning(0, seed)))
        if task in DEEP_TASKS and not only:
            deep[task] = accuracy(ask(random_pruning(before_layer, seed)))
    captions = {}
    for name in dict.fromkeys((split, "typical") if split == "test" else (split,)):
        if not only or CAPTION in only:
            scenes = benchmark(name, (CAPTION,), questions, seed, version.world.name)
            texts = generate_answers(model, processor, scenes, scenes.rows)
            captions[name] = caption_scores(texts, [scenes.scene(row["image"]) for row in scenes.rows])
    result = {"version": version.name, "split": split, "tasks": tasks, "existence": _pope(tasks), "captions": captions}
    result |= {"pruned": {"keep": KEEP, **pruned}, "deep": {"keep": KEEP, "before_layer": before_layer, **deep}}
    return result | {"floors": check_floors(result, FLOORS.get(version.name, {}))}


def _pope(tasks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Accuracy, recall and false yes of each measured category on equally many yes and no questions."""
    table = {}
    for task in EXISTENCE_TASKS:
        if task not in tasks or "exist-yes" not in tasks:
            continue
        recall = tasks["exist-yes"]["accuracy"]
        false_yes = round(1 - tasks[task]["accuracy"], 4)
        precision = recall / max(recall + false_yes, 1e-9)
        table[task.removeprefix("exist-")] = {
            "accuracy": round((recall + 1 - false_yes) / 2, 4),
            "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4),
            "false_yes": false_yes,
        }
    return table


def _floor_values(result: dict[str, Any]) -> dict[str, float]:
    """What the measured part of a result says about floors, by their names."""
    shares = {task: measured["accuracy"] for task, measured in result["tasks"].items()}
    values = dict(shares)
    for task, name in (("exist-yes", "existence yes"), ("exist-random", "existence no, random")):
        if task in shares:
            values[name] = shares[task]
    captions = result["captions"].get(result["split"])
    if captions:
        values |= {"caption recall": captions["recall"], "caption CHAIR_s": captions["chair_s"]}
    if {"exist-random", "exist-adversarial"} <= shares.keys():
        values["false yes, adversarial minus random"] = shares["exist-random"] - shares["exist-adversarial"]
    for task in DEEP_TASKS:
        if task in result["pruned"]:
            loss = shares[task] - result["pruned"][task]["accuracy"]
            values[f"loss of {task} by random pruning"] = loss
    lost = [shares[task] - result["deep"][task]["accuracy"] for task in DEEP_TASKS if task in result["deep"]]
    if lost:
        values["largest loss by random pruning after a third of the layers"] = max(lost)
    return values


def check_floors(result: dict[str, Any], floors: dict[str, float]) -> list[dict[str, Any]]:
    """Each floor that the result speaks of with its measured value and whether it is met."""
    values = _floor_values(result)
    return [
        {"name": name, "value": round(values[name], 4), "floor": floor, "met": values[name] >= floor - 1e-9}
        for name, floor in floors.items()
        if name in values
    ]


def _statistics(model: Any, processor: Any, seed: int, version: Version) -> dict[str, Any]:
    """Statistics on one question of each STATISTICS_TASKS about STATISTICS_PICTURES pictures of the split `test`."""
    scenes = benchmark("test", STATISTICS_TASKS, STATISTICS_PICTURES, seed, version.world.name)
    prompts = [chat_prompt(processor, row["text"]) for row in scenes.rows]
    return statistics(model, processor, prompts, [scenes.image(row["image"]) for row in scenes.rows])


def main(arguments: list[str] | None = None) -> None:
    """Command line of :func:`measure`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.measure",
        description="Accuracy per task, hallucination and the price of random pruning, on freshly drawn scenes.",
    )
    parser.add_argument("--model", required=True, help=f"a folder, or one of {', '.join(names())}")
    parser.add_argument("--questions", type=int, default=400, help="questions per task (default %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=200, help="prompts of each kind with several pictures (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, required=True, help="seed of the split; take one nobody has looked at")
    parser.add_argument(
        "--card", action="store_true", help="also write measured.json, the pictures and MODEL_CARD.md into the folder"
    )
    options = parser.parse_args(arguments)
    folder = path(options.model) if options.model in names() else Path(options.model)
    version = recorded_version(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = load_processor(folder)
    started = time.monotonic()
    result = measure(model, processor, options.questions, options.seed, version)
    result["statistics"] = _statistics(model, processor, options.seed, version)
    command = f"python -m vlmattn.scenes.measure --model {shlex.quote(folder.name)} --questions {options.questions}"
    if recorded_settings(folder).get("several_steps"):
        from .several_measure import measure_several

        result["several"] = measure_several(model, processor, options.prompts, options.seed)
        command += f" --prompts {options.prompts}"
    result["command"] = f"{command} --seed {options.seed}"
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(card.measured_tables(result))
    print(f"{time.monotonic() - started:.0f} s")
    if options.card:
        (folder / card.MEASURED_FILE).write_text(json.dumps(result, indent=1) + "\n")
        figures.write(folder)
        card.write(folder)


if __name__ == "__main__":
    main()
