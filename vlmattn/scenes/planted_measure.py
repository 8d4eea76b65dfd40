"""Measure the planted sink (planted.py): accuracy, captions and attention, natural, planted, and planted with `var`."""

from __future__ import annotations

import json
import math
import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import vlmattn
from vlmattn import discover, presets
from vlmattn.methods.attend.var import VAR, sink_strength

from . import library
from .measure import caption_scores, chat_prompt, generate_answers
from .planted import BASE, NAME, read_recipe
from .splits import SceneSet, benchmark
from .text import BOS_ID, IMAGE_ID

TASKS = ("exist-random", "exist-adversarial", "loc", "cell", "color", "shape", "digits")
SPECS = ("var", "var(rho=0.0)", "var(p=1.0, rho=0.0)")
"""p = 0.6 and rho = 0.5 are the defaults; with rho = 0 rows are edited in which most visual attention is on sinks; the
last takes everything in nearly every row."""
LONG_EVIDENCE = ("layers", "profile")
"""What the packaged presets leave out."""
QUESTIONS_PER_SCENE = 4.0
"""Existence questions of an average scene, at the least; one question a scene for the others."""


def measure(questions: int, seed: int) -> dict[str, Any]:
    """Accuracy per task and hallucination in captions of each model, and the attention on the planted sinks.

    Args:
        questions: per task, and captions.
        seed: of the split `test`; 0 is the published set.
    """
    world = library.version(BASE).world.name
    sets = {task: _questions(task, questions, seed, world) for task in (*TASKS, "caption")}
    natural, planted = library.load(BASE), library.load(NAME)
    runs = {BASE: _answers(*natural, sets, None), NAME: _answers(*planted, sets, None)}
    runs |= {f"{NAME}, {spec}": _answers(*planted, sets, spec) for spec in SPECS}
    table = {name: _scores(sets, answers) for name, answers in runs.items()}
    for name, answers in runs.items():
        for task in sets:
            pairs = zip(answers[task], runs[NAME][task], strict=True)
            table[name][task]["differs"] = sum(mine != base for mine, base in pairs)
    return {
        "questions": questions,
        "seed": seed,
        "scores": table,
        "attention": attention(*planted, sets["cell"]),
        "discovery": _discover(NAME).to_dict(),
        "command": f"python -m vlmattn.scenes.planted --measure --questions {questions} --seed {seed}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _questions(task: str, count: int, seed: int, world: str) -> SceneSet:
    """A set of just `count` questions; yes and no equal in number where the task has them."""
    pictures = count if not task.startswith("exist") else int(count / QUESTIONS_PER_SCENE) + 1
    found = benchmark("test", (task,), pictures, seed, world)
    while len(found.rows) < count:
        pictures += 10
        found = benchmark("test", (task,), pictures, seed, world)
    return replace(found, rows=found.rows[:count])


def _answers(model: Any, processor: Any, sets: dict[str, SceneSet], spec: str | None) -> dict[str, list[str]]:
    with vlmattn.wrap(model, spec) if spec else nullcontext():
        return {task: generate_answers(model, processor, scenes, scenes.rows) for task, scenes in sets.items()}


def _scores(sets: dict[str, SceneSet], answers: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for task, scenes in sets.items():
        if task == "caption":
            table[task] = caption_scores(answers[task], [scenes.scene(row["image"]) for row in scenes.rows])
        else:
            right = [answer == row["label"] for answer, row in zip(answers[task], scenes.rows, strict=True)]
            table[task] = {"n": len(right), "accuracy": round(sum(right) / len(right), 4)}
    return table


@torch.no_grad()
def attention(model: Any, processor: Any, scenes: SceneSet, count: int = 50) -> dict[str, Any]:
    """Where the text rows behind the image look, per planted layer and head, and how often the gates of `var` open.

    Returns:
        `sinks_per_image`, and by layer: per head the mean share of a row on the image (`visual`), on visual sinks
        (`visual_sinks`) and on `<bos>` (`bos`), and the share of rows that the defaults of `var` edit (`edited`).
    """
    rows = scenes.rows[:count]
    texts = [chat_prompt(processor, row["text"]) for row in rows]
    images = [scenes.image(row["image"]) for row in rows]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    dims, defaults = read_recipe().dims, VAR(sinks=read_recipe().dims)
    visual, bos = inputs["input_ids"] == IMAGE_ID, inputs["input_ids"] == BOS_ID
    asked = inputs["attention_mask"].bool() & ~visual & (visual.cumsum(1) > 0)
    tau = 0.3125 * math.sqrt(out.hidden_states[0].shape[-1])
    found: dict[str, Any] = {"layers": {}}
    for layer in defaults.layers(len(out.attentions)):
        sinks = visual & (sink_strength(out.hidden_states[layer], dims) > tau)
        share = [
            torch.einsum("bhnk,bk->bnh", out.attentions[layer], group.float())[asked] for group in (visual, sinks, bos)
        ]
        open_ = (share[0] >= defaults.min_visual) & (share[0] - share[1] >= defaults.rho * share[0])
        open_ &= sinks.any(1)[:, None].expand_as(asked)[asked][:, None]
        parts = dict(zip(("visual", "visual_sinks", "bos", "edited"), (*share, open_.float()), strict=True))
        found["layers"][str(layer)] = {
            name: [round(x, 4) for x in part.mean(0).tolist()] for name, part in parts.items()
        }
        found["sinks_per_image"] = round(float(sinks.sum(1).float().mean()), 2)
    return found


def _discover(name: str) -> discover.Discovery:
    """What `vlmattn discover --model NAME` finds."""
    return discover.discover(*library.load(name), images=discover.scene_pictures(name=name), pictures="scenes")


def update_presets() -> list[dict[str, Any]]:
    """Look for sinks in the embedded models and write what was found over their entries in the packaged presets."""
    file = Path(presets.__file__).with_name("sinks.json")
    entries = [entry for entry in presets.read(file) if not {BASE, NAME} & set(entry["names"])]
    found = []
    for name in (BASE, NAME):
        entry = _discover(name).preset(f"vlmattn discover --model {name}")
        entry["evidence"] = {key: value for key, value in entry["evidence"].items() if key not in LONG_EVIDENCE}
        found.append(entry)
    lines = ",\n".join("  " + json.dumps(entry) for entry in [*entries, *found])
    file.write_text(f"[\n{lines}\n]\n")
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The measured numbers as Markdown tables."""
    lines = [f"Measured by `{result['command']}`: {result['questions']} questions a task from the split `test`; in "
             "brackets how many of these answers differ from the planted model's.", ""]  # fmt: skip
    head = ["model", *TASKS, "CHAIR_i", "CHAIR_s", "caption recall"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, scores in result["scores"].items():
        row = [name, *(f"{scores[task]['accuracy']:.3f} ({scores[task]['differs']})" for task in TASKS)]
        caption = scores["caption"]
        row += [f"{caption[key]:.3f}" for key in ("chair_i", "chair_s", "recall")]
        row[-1] += f" ({caption['differs']})"
        lines.append("| " + " | ".join(row) + " |")
    found = result["attention"]
    lines += ["", f"Attention of the text rows behind the image, per head; {found['sinks_per_image']} visual sinks an "
              "image:", "", "| layer | on the image | on visual sinks | on `<bos>` | rows that `var` edits |",
              "|---|---|---|---|---|"]  # fmt: skip
    for layer, parts in found["layers"].items():
        cells = [" ".join(f"{x:.2f}" for x in parts[name]) for name in ("visual", "visual_sinks", "bos", "edited")]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    told = result["discovery"]
    lines += ["", f"`vlmattn discover`: {told['verdict']}, dimensions {told['sink_dims']}, confidence "
              f"{told['confidence_word']} ({told['confidence']:.2f}); {told['reason']}."]  # fmt: skip
    return "\n".join(lines)
