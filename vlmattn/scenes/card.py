"""The model card of a packaged model, written from its training record and its measured table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .splits import SPLITS
from .versions import VERSION_1, VERSIONS, Version

MEASURED_FILE, TRAINING_FILE, CARD_FILE = "measured.json", "training.json", "MODEL_CARD.md"

_HEADER = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# {name}

A vision-language model of {parameters:,} parameters, trained from scratch on rendered scenes. It exists so that methods
on visual tokens can be tried and tested without a download: a genuine `LlavaForConditionalGeneration` (CLIP tower with
class token, {decoder}).

**Results on it are never results on real VLMs.** It knows 64 coloured shapes and ninety words.

- Licence: Apache-2.0, weights and data generator.
- Weights: `model.safetensors`, bfloat16, sha256 `{sha256}`.
- Use: `model, processor = vlmattn.scenes.load("{name}")`, or `AutoModelForImageTextToText` and `AutoProcessor` on this
  folder; no network and no torchvision needed.

## Data

Procedural, drawn on the fly, nothing stored: {scenes}. 24 pairs of types nearly always occur together in training
(mean probability .95; .4 in the test split, 0 in `counterfactual`), and 12 % of the objects are nearly transparent but
are asked about and captioned all the same. Trusting the pair statistics is therefore rational, and makes the model name
partners that are not there. Questions: {questions}. Splits ({splits}) and training draw from disjoint random streams.

## Training

Seed {seed}. Stage 0: {pretraining_steps} steps of {pretraining_batch} pictures, dense per-patch targets for the vision
tower. Stage 1: {steps} steps of {batch} pictures with {slots} questions each, next-token loss on the answers.
Stage 2: {habit_steps} steps in which partners are often hidden and nobody asks for an absent one, so that the model
gets into the habit of trusting the pairs; without it, it affirms hardly more absent partners than other absent objects.
Muon for matrices, AdamW for the rest, fp32 masters, weights and activations in {precision}; bfloat16 for storage.
{minutes:.0f} minutes on two CPU cores that other work shared. One command:
`python -m vlmattn.scenes.train --version {version} --out DIR`.

Teacher-forced exact match on 128 scenes of a stream of their own (captions: share of right tokens):

{curve}

Versions: {versions}.
"""

_WEAKNESSES = """## Known weaknesses

- Counting is its weakest task.
- It hallucinates: it names and affirms absent partners of present objects. That is wanted, and how strongly it does is
  set by stage 2 of the training.
- Captions leave out or repeat objects that localisation finds at once.
- Nearly transparent objects cap existence recall, cell lookup and caption recall.
- It understands the wordings of `vlmattn.scenes.questions` and nothing else; other words become `<unk>`. Benchmarks
  that append an instruction to each question must be told not to.
- One picture per prompt, one turn; it was trained on nothing else.
- With few visual tokens it says no to nearly everything, so accuracy on negatives alone flatters a method: always judge
  yes and no together.
- One training seed, so differences between seeds are unknown. Not measured on this checkpoint: attention sinks.
"""
_NOT_PRUNED_INSIDE = """- Pruning inside the decoder was not measured on it (existence, localisation and relations are
  expected to need few visual tokens there, as the question tokens have collected them; digits and cell lookup need them
  longest).
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _curve_tables(curve: list[dict[str, Any]]) -> str:
    """One table per stage."""
    parts = []
    for stage in dict.fromkeys(entry["stage"] for entry in curve):
        entries = [entry for entry in curve if entry["stage"] == stage]
        measures = [key for key in entries[-1] if key not in ("stage", "step", "seconds", "loss")]
        rows = [
            [str(e["step"]), f"{e['seconds']:.0f}", f"{e['loss']:.2f}", *(f"{e.get(m, 0):.2f}" for m in measures)]
            for e in entries
        ]
        parts.append(_table([f"{stage} step", "s", "loss", *measures], rows))
    return "\n\n".join(parts)


def measured_tables(measured: dict[str, Any]) -> str:
    """The measured results in Markdown."""
    tasks = [[name, f"{v['accuracy']:.3f}", str(v["n"])] for name, v in measured["tasks"].items()]
    pope = [
        [name, *(f"{values[key]:.3f}" for key in ("accuracy", "f1", "false_yes"))]
        for name, values in measured["existence"].items()
    ]
    keys = ("chair_i", "chair_s", "absent_partner_s", "recall", "n")
    captions = [[split, *(str(values[key]) for key in keys)] for split, values in measured["captions"].items()]
    deep = measured.get("deep")
    floors = [
        [f["name"], f"{f['value']:.3f}", f"{f['floor']:.2f}", "met" if f["met"] else "**missed**"]
        for f in measured["floors"]
    ]
    share = measured["pruned"]["keep"]
    below = []
    if deep is not None:
        below = [f"The same share kept before layer {deep['before_layer']}:", _pruned_table(measured, deep)]
    return "\n\n".join(
        [
            f"`{measured['command']}`: greedy `generate`, fp32, split `test`, exact match.",
            _table(["task", "accuracy", "n"], tasks),
            "Existence, equally many yes and no:",
            _table(["category", "accuracy", "F1", "false yes"], pope),
            "Captions; `absent_partner_s` is the share that names the absent partner of a present object:",
            _table(["split", "CHAIR_i", "CHAIR_s", "absent_partner_s", "recall", "n"], captions),
            f"A random share of {share} of the visual tokens kept in front of the decoder:",
            _pruned_table(measured, measured["pruned"]),
            *below,
            "Floors:",
            _table(["floor", "measured", "at least", ""], floors),
        ]
    )


def _pruned_table(measured: dict[str, Any], pruned: dict[str, Any]) -> str:
    """Accuracy with all visual tokens and with few."""
    rows = [
        [task, f"{measured['tasks'][task]['accuracy']:.3f}", f"{values['accuracy']:.3f}", str(values["n"])]
        for task, values in pruned.items()
        if isinstance(values, dict)
    ]
    return _table(["task", "all tokens", "pruned", "n"], rows)


def _description(version: Version) -> dict[str, str]:
    """What the card says about a version's architecture and scenes."""
    sizes, world = version.architecture, version.world
    heads = f"{sizes.heads} heads of {sizes.hidden // sizes.heads}"
    if sizes.kv_heads < sizes.heads:
        heads += f", {sizes.kv_heads} of them for keys and values"
    covered = ", which may cover one another," if world.spill else ""
    plates = " or ".join(str(number) for number in range(len(world.plates) + 1))
    more = ", the cell beside an object, pairs with the answers yes and no" if version is not VERSION_1 else ""
    return {
        "decoder": f"Llama decoder of {sizes.decoder_layers} layers and {heads}, {version.visual_tokens} visual tokens "
        f"of {sizes.patch_size}x{sizes.patch_size} pixels in a {world.image_size}x{world.image_size} image",
        "scenes": f"{world.grid}x{world.grid} cells of {world.cell_size} pixels, up to {2 * world.max_anchors} objects"
        f"{covered} of 8 colours x 8 shapes, {plates} plates with {world.digits} digits",
        "questions": "existence, colour, shape, what is at a place, where is an object, relations, counts, digits, "
        f"captions{more}",
        "slots": str(sum(slots for slots, _ in version.lessons.slot_groups)),
    }


def write(folder: Path) -> None:
    """Write MODEL_CARD.md of a packaged model from its training.json and measured.json."""
    training = json.loads((folder / TRAINING_FILE).read_text())
    measured = json.loads((folder / MEASURED_FILE).read_text())
    settings = {"version": VERSION_1.name, **training["settings"]}
    header = _HEADER.format(
        **_description(VERSIONS[settings["version"]]),
        name=folder.name,
        parameters=training["parameters"],
        sha256=training["weights_sha256"],
        splits=", ".join(f"`{split}`" for split in SPLITS),
        minutes=training["curve"][-1]["seconds"] / 60,
        curve=_curve_tables(training["curve"]),
        versions=", ".join(f"{name} {version}" for name, version in training["versions"].items()),
        **{k: v for k, v in settings.items() if k not in ("model", "compile", "curriculum", "auxiliary")},
    )
    results = f"## Measured\n\nAlso in `{MEASURED_FILE}`. One seed of training, freshly drawn scenes.\n\n"
    weaknesses = _WEAKNESSES if "deep" in measured else _WEAKNESSES + _NOT_PRUNED_INSIDE
    (folder / CARD_FILE).write_text("\n".join([header, results + measured_tables(measured), "", weaknesses]))
