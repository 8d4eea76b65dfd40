"""The model card of a packaged model, written from its training record and its measured table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .several_kinds import KINDS
from .splits import SPLITS
from .text import WORDS
from .versions import LLAVA, QWEN, VERSIONS, Version

MEASURED_FILE, TRAINING_FILE, CARD_FILE = "measured.json", "training.json", "MODEL_CARD.md"
CURVE_FILE, ATTENTION_FILE, ACTIVATIONS_FILE = "curve.png", "attention.png", "activations.png"
NOT_MEASURES = ("stage", "step", "seconds", "loss")
"""What every line of a curve has besides its measures."""
ABANDONED = "abandoned"
"""In training.json: the curves of the seeds that were given up, by seed."""

_HEADER = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# {name}

A vision-language model of {parameters:,} parameters, trained from scratch on rendered scenes. It exists so that methods
on visual tokens can be tried and tested without a download: a genuine `{architecture}` ({tower}, {decoder}).

**Results on it are never results on real VLMs.** It knows 64 coloured shapes; of the {words} words
of its vocabulary some were never taught.

- Licence: Apache-2.0, weights and data generator.
- Weights: `model.safetensors`, bfloat16, sha256 `{sha256}`.
- Use: `model, processor = vlmattn.scenes.load("{name}")`; no network and no torchvision needed.
  `AutoModelForImageTextToText` and `AutoProcessor` read this folder, too{torchvision}.

## Data

Procedural, drawn on the fly, nothing stored: {scenes}. 24 pairs of types nearly always occur together in training
(mean probability .95; .4 in the test split, 0 in `counterfactual`), and 12 % of the objects are nearly transparent but
are asked about and captioned all the same. Trusting the pair statistics is therefore rational, and makes the model name
partners that are not there. Questions: {questions}. Splits ({splits}) and training draw from disjoint random streams.

## Training

Seed {seed}.{start} Stage 0: {pretraining_steps} steps of {pretraining_batch} pictures, dense per-patch targets for the
vision tower. Stage 1: {steps} steps of {batch} pictures with {slots} questions each, next-token loss on the answers.
{several}\
Stage 2: {habit_steps} steps in which partners are often hidden and nobody asks for an absent one, so that the model
gets into the habit of trusting the pairs; without it, it affirms hardly more absent partners than other absent objects.
{habit}Muon for matrices, AdamW for the rest, fp32 masters, weights and activations in {precision}, bfloat16 for
storage.
{minutes:.0f} minutes on two CPU cores that other work shared:
`python -m vlmattn.scenes.train --version {version} --out DIR`, then `vlmattn.scenes.choose` and `export`. {seeds}

Teacher-forced exact match on 128 scenes of a stream of their own (captions: share of right tokens); the whole curve is
in `{training_file}`. After the last step of each stage:

{curve}

![Loss and accuracy of each stage by step]({curve_file})

Versions: {versions}.
"""

_WEAKNESSES = """## Known weaknesses

- Counting is its weakest task.
- It hallucinates: it names and affirms absent partners of present objects. That is wanted, and how strongly it does is
  set by stage 2 of the training.
- Captions leave out or repeat objects that localisation finds at once.
- Nearly transparent objects cap existence recall, cell lookup and caption recall.
- It understands the wordings of {wordings} and nothing else; other words become
  `<unk>` or an embedding that was never trained. Benchmarks
  that append an instruction to each question must be told not to.
- {pictures}, one turn; it was trained on nothing else.
- Where an object is reaches the question tokens in the first layers: pruning behind them hardly costs `loc`. Compare
  such methods on `cell` and `digits`.
- With few visual tokens it says no far too often, so accuracy on negatives alone flatters a method: always judge yes
  and no together.
- One training seed, so differences between seeds are unknown.
"""
_ONE_PICTURE = {"wordings": "`vlmattn.scenes.questions`", "pictures": "One picture per prompt"}
_SEVERAL_PICTURES = {
    "wordings": "`vlmattn.scenes.questions` and `several_questions`",
    "pictures": "One picture, two images or a short video per prompt",
}
_SEVERAL = "Then {steps} steps of which every other one shows two images or a video of {frames} frames.\n"
_START = " The decoder starts from that of `{source}`."
_HABIT = """What is shipped lies between the weights before and after stage 2: before + {share} * (after - before){why}.
"""
_GIVEN = ", a\nshare that was given to `vlmattn.scenes.export` by hand"
_CHOSEN = ", the\nsmallest share with enough hallucination on the split `val` (`vlmattn.scenes.choose`)"
_TOWERS = {LLAVA: "CLIP tower with class token", QWEN: "Qwen2.5-VL tower with window attention"}
_MASSIVE, _MASSIVE_RATIO = 100, 1000
"""What makes an activation massive in arXiv 2402.17762: its size, and its ratio to the median."""


_TOLD = ("seed", "version", "pretraining_steps", "pretraining_batch", "steps", "batch", "habit_steps", "precision")
"""Settings that the header names."""
_SHARES = ("visual", "visual_last", "first")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_stage(curve: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of a curve by stage, in order; measures of a kind of prompt stand apart, as a stage of their own."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for entry in curve:
        own = {name: value for name, value in entry.items() if not isinstance(value, dict)}
        stages.setdefault(entry["stage"], []).append(own)
        for kind, measures in entry.items():
            if isinstance(measures, dict):
                shared = {name: entry[name] for name in NOT_MEASURES}
                stages.setdefault(f"{entry['stage']}, {kind}", []).append({**shared, **measures})
    return stages


def _curve_tables(curve: list[dict[str, Any]]) -> str:
    """The last line of each stage, one table per set of measures."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for stage, entries in by_stage(curve).items():
        last = entries[-1]
        measures = tuple(key for key in last if key not in NOT_MEASURES)
        row = [stage, str(last["step"]), f"{last['seconds'] / 60:.0f}", f"{last['loss']:.2f}"]
        tables.setdefault(tuple(sorted(measures)), [["stage", "step", "minutes", "loss", *sorted(measures)]])
        tables[tuple(sorted(measures))].append([*row, *(f"{last[name]:.2f}" for name in sorted(measures))])
    return "\n\n".join(_table(rows[0], rows[1:]) for rows in tables.values())


def statistics_tables(statistics: dict[str, Any]) -> str:
    """Attention and activations in Markdown."""
    attention = []
    for layer, shares in enumerate(statistics["attention"]):
        visual, last, first = (shares[key] for key in _SHARES)
        cells = (sum(visual) / len(visual), max(visual), sum(last) / len(last), sum(first) / len(first), shares["most"])
        attention.append([str(layer), *(f"{cell:.2f}" for cell in cells)])
    kinds = [kind for kind in statistics["activations"][0] if kind != "median"]
    sizes = [
        [str(layer), f"{found['median']:.3f}", *(_activation(found[kind]) for kind in kinds)]
        for layer, found in enumerate(statistics["activations"])
    ]
    head = ["layer", "on the image", "its strongest head", "of the last token", "on the first token", "most attended"]
    return "\n\n".join(
        [
            f"Over {statistics['questions']} questions. Share of the attention of the tokens behind the image, mean "
            "over them and the heads; `most attended` is the share of that on the image that one visual token gets:",
            _table(head, attention),
            f"![Attention on visual tokens by layer and head]({ATTENTION_FILE})",
            "Largest activation at the input of each layer by kind of token: its ratio to the median of all, its "
            "dimension, and the share of the tokens of that kind that are largest in this dimension:",
            _table(["layer", "median", *kinds], sizes),
            f"![Largest activations by layer]({ACTIVATIONS_FILE})",
            _massive(statistics["activations"], kinds),
        ]
    )


def _activation(found: dict[str, Any]) -> str:
    """One cell of the table of activations."""
    return f"{found['ratio']:.2g} (dim {found['dimension']}, {found['agreeing']:.0%})"


def _massive(layers: list[dict[str, Any]], kinds: list[str]) -> str:
    """Which activations are massive, or how far the largest one is from it."""
    found = [(layer[kind]["ratio"], number, layer[kind]) for number, layer in enumerate(layers) for kind in kinds]
    massive = [item for item in found if item[0] >= _MASSIVE_RATIO and item[2]["largest"] >= _MASSIVE]
    ratio, number, largest = max(found, key=lambda item: item[0])
    where = f"`{largest['token']}`, dimension {largest['dimension']}, input of layer {number}"
    rule = f"above {_MASSIVE} and {_MASSIVE_RATIO:,} times the median, as in arXiv 2402.17762"
    if massive:
        return f"Massive activations ({rule}) occur in {len(massive)} of these cells; the largest: {where}."
    return (
        f"No massive activations ({rule}): the largest is {largest['largest']:.1f}, {ratio:.0f} times the median "
        f"({where})."
    )


def measured_tables(measured: dict[str, Any]) -> str:
    """The measured results in Markdown."""
    tasks = [[name, f"{v['accuracy']:.3f}", str(v["n"])] for name, v in measured["tasks"].items()]
    pope = [
        [name, *(f"{values[key]:.3f}" for key in ("accuracy", "f1", "false_yes"))]
        for name, values in measured["existence"].items()
    ]
    keys = ("chair_i", "chair_s", "absent_partner_s", "recall", "n")
    captions = [[split, *(str(values[key]) for key in keys)] for split, values in measured["captions"].items()]
    floors = [
        [f["name"], f"{f['value']:.3f}", f"{f['floor']:.2f}", "met" if f["met"] else "**missed**"]
        for f in measured["floors"]
    ]
    pruned, deep = measured["pruned"], measured["deep"]
    return "\n\n".join(
        [
            f"`{measured['command']}`: greedy `generate`, fp32, split `test`, exact match.",
            _table(["task", "accuracy", "n"], tasks),
            "Existence, equally many yes and no:",
            _table(["category", "accuracy", "F1", "false yes"], pope),
            "Captions; `absent_partner_s` is the share that names the absent partner of a present object:",
            _table(["split", "CHAIR_i", "CHAIR_s", "absent_partner_s", "recall", "n"], captions),
            f"A random share of {pruned['keep']} of the visual tokens kept in front of the decoder:",
            _pruned_table(measured, pruned),
            f"The same share kept before layer {deep['before_layer']}:",
            _pruned_table(measured, deep),
            *_several_tables(measured.get("several", {})),
            "Floors:",
            _table(["floor", "measured", "at least", ""], floors),
            statistics_tables(measured["statistics"]),
        ]
    )


def _several_tables(several: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Accuracy on prompts with several pictures, a column for each kind; nothing where it was not measured."""
    if not several:
        return []
    tasks = dict.fromkeys(task for found in several.values() for task in found)
    cells = [
        [f"{found[task]['accuracy']:.3f} ({found[task]['n']})" if task in found else "" for found in several.values()]
        for task in tasks
    ]
    rows = [[task, *row] for task, row in zip(tasks, cells, strict=True)]
    return [
        "Prompts with several pictures, accuracy (n): " + _kinds() + ".",
        _table(["task", *several], rows),
    ]


def _kinds() -> str:
    """The kinds of prompts with several pictures, in words."""
    told = []
    for name, kind in KINDS.items():
        height, width = kind.world.size
        shown = f"a video of {kind.pictures} frames" if kind.video else f"{kind.pictures} images"
        told.append(f"`{name}` shows {shown} of {width}x{height}")
    return ", ".join(told)


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
    plates = " or ".join(str(number) for number in range(len(world.plates) + 1))
    token = sizes.patch_size * sizes.merge
    pictures = " or ".join(f"{width}x{height}" for height, width in world.sizes)
    words = [word for word in WORDS if not word.startswith("<")]
    return {
        "decoder": f"decoder of {sizes.decoder_layers} layers and {heads}, a visual token for {token}x{token} pixels "
        f"of pictures of {pictures}",
        "words": str(len(words)),
        "scenes": f"{world.grid}x{world.grid} cells, up to {2 * world.max_anchors} objects of 8 colours x 8 shapes "
        f"that may cover one another, {plates} plates with {world.digits} digits",
        "questions": "existence, colour, shape, what is at a place, where is an object, relations, counts, digits, "
        "captions, the cell beside an object, pairs with the answers yes and no",
        "slots": str(sum(slots for slots, _ in version.lessons.slot_groups)),
    }


def _seeds(settings: dict[str, Any], abandoned: dict[str, Any]) -> str:
    """What the card says about seeds that were given up."""
    if not abandoned:
        return "No seed was given up."
    given_up = ", ".join(abandoned)
    return f"Before seed {settings['seed']}, given up because they sat on a plateau: {given_up}."


def write(folder: Path) -> None:
    """Write MODEL_CARD.md of a packaged model from its config.json, training.json and measured.json."""
    config, training, measured = (
        json.loads((folder / file).read_text()) for file in ("config.json", TRAINING_FILE, MEASURED_FILE)
    )
    settings, share, choice = training["settings"], training["habit_share"], training["choice"]
    version = VERSIONS[settings["version"]]
    why = _CHOSEN if choice.get("good_share") and choice["habit_share"] == share else _GIVEN
    several = settings.get("several_steps", 0)
    frames = " or ".join(str(kind.pictures) for kind in KINDS.values() if kind.video)
    header = _HEADER.format(
        **_description(version),
        name=folder.name,
        architecture=config["architectures"][0],
        start=_START.format(source=source) if (source := settings.get("decoder_from")) else "",
        torchvision=", the latter only with torchvision" if version.family == QWEN else "",
        tower=_TOWERS[version.family],
        parameters=training["parameters"],
        sha256=training["weights_sha256"],
        splits=", ".join(f"`{split}`" for split in SPLITS),
        minutes=training["curve"][-1]["seconds"] / 60,
        several=_SEVERAL.format(steps=several, frames=frames) if several else "",
        habit=_HABIT.format(share=share, why=why) if share != 1 else "",
        seeds=_seeds(settings, training[ABANDONED]),
        training_file=TRAINING_FILE,
        curve_file=CURVE_FILE,
        curve=_curve_tables(training["curve"]),
        versions=", ".join(f"{name} {number}" for name, number in training["versions"].items()),
        **{key: settings[key] for key in _TOLD},
    )
    results = f"## Measured\n\nAlso in `{MEASURED_FILE}`. One seed of training, freshly drawn scenes.\n\n"
    weaknesses = _WEAKNESSES.format(**(_SEVERAL_PICTURES if several else _ONE_PICTURE))
    (folder / CARD_FILE).write_text("\n".join([header, results + measured_tables(measured), "", weaknesses]))
