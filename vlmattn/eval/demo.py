"""`vlmattn demo`: the embedded model answers with and without pruning; a table and one self-contained page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmattn.eval import bench as benches
from vlmattn.eval import page, plots, runner, summary
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Benchmark, Item

if TYPE_CHECKING:
    from rich.table import Table

    from vlmattn.eval.models import Loaded

SPECS = (
    "none",
    "fastv(keep=0.5, before_layer=2)",
    "fastv(keep=0.11, before_layer=2)",
    "random(keep=0.11, before_layer=2)",
    "uniform(keep=0.25)",
    "uniform(keep=0.11)",
    "vhr",
)
SINK_SPECS = ("none", "var", "fastv(keep=0.5, before_layer=2) + var + vhr")
PICTURED = ("fastv(keep=0.11, before_layer=2)", "random(keep=0.11, before_layer=2)", "uniform(keep=0.11)")
IMAGES = 100
BATCH_SIZE = 30
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Attributes:
        loaded: the embedded model.
        pope, scenes: the two benchmarks.
        pope_rows, scenes_rows: a row per spec, in the same order.
        texts: spec -> item id -> raw text of the scenes benchmark.
        images: how many scenes were used.
    """

    loaded: Loaded
    pope: Benchmark
    scenes: Benchmark
    pope_rows: Sequence[summary.Row]
    scenes_rows: Sequence[summary.Row]
    texts: Mapping[str, Mapping[str, str]]
    images: int


def measure(
    loaded: Loaded, images: int = IMAGES, specs: Sequence[str] = SPECS, progress: runner.Progress | None = None
) -> Result:
    """Run both benchmarks under every spec; the run folders are temporary, `vlmattn eval` is for keeping them.

    Args:
        loaded: the embedded model.
        images: scenes per benchmark.
        specs: spec texts; the first one is what the others are compared with.
        progress: called with (benchmark and spec, done, all).
    """
    from vlmattn.eval.records import read_records, texts

    chosen = runner.split_specs(";".join(specs))
    settings = runner.Settings(batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS, command="vlmattn demo")
    both = (
        benches.load("pope", embedded=True, scenes_count=images),
        benches.load("scenes", embedded=True, scenes_count=images),
    )
    with _one_thread(), tempfile.TemporaryDirectory(prefix="vlmattn-demo-") as out:
        rows = []
        for bench in both:
            report = None if progress is None else _named(progress, bench.name, chosen)
            rows.append(runner.sweep(loaded, bench, chosen, Path(out) / bench.name, settings, report))
        said = {row.label: dict(texts(read_records(row.folder))) for row in rows[1]}
    return Result(loaded, both[0], both[1], rows[0], rows[1], said, images)


def sink_section(result: Result) -> page.Section:
    """The table of the variant with planted attention sinks."""
    return page.Section(
        title="Redistribution, reinforcement and all three, on a model with planted sinks",
        text=(
            f"{result.loaded.name} is the same model after an edit of its weights that makes a few background tokens "
            "soak up attention, as happens by itself in large models. The model above has no such sinks, so that var "
            "has nothing to redistribute there. The sinks are artificial: this table shows that the methods act and "
            "compose, not that they help."
        ),
        columns=columns(),
        rows=cells(result),
    )


def columns() -> list[str]:
    """Head of the demo's table."""
    return [
        "method",
        "visual tokens",
        "POPE accuracy %",
        "POPE F1 %",
        *(f"{scenes.TASK_NAMES[task]} %" for task in scenes.TASKS),
        "KV cache",
        "prefill",
        "per token",
    ]


def cells(result: Result) -> list[list[str]]:
    """The demo's table, a list of texts per spec."""
    table = []
    for existence, place in zip(result.pope_rows, result.scenes_rows, strict=True):
        table.append(
            [
                existence.label,
                summary.tokens_text(existence.cost),
                _text(existence, "mean_accuracy"),
                _text(existence, "mean_f1"),
                *(_text(place, f"{task}.accuracy") for task in scenes.TASKS),
                *summary.cost_texts(existence.cost),
            ]
        )
    return table


def terminal_tables(result: Result) -> list[Table]:
    """Two tables that fit a terminal: what is answered right, and what it costs."""
    head, body = columns(), cells(result)
    answers, cost = [0, *range(2, 4 + len(scenes.TASKS))], [0, 1, *range(4 + len(scenes.TASKS), len(head))]
    name = result.loaded.name
    titles = (f"{name}: right answers, below them the 95 % interval", f"{name}: cost per question")
    return [
        summary.terminal_table(title, [head[n] for n in chosen], [[row[n] for n in chosen] for row in body])
        for title, chosen in zip(titles, (answers, cost), strict=True)
    ]


def content(result: Result, sinks: Result, examples: Sequence[page.Example]) -> page.Content:
    """Everything the page shows."""
    name = result.loaded.name
    about = {
        "model": f"{name} ({type(result.loaded.model).__name__}, {result.loaded.dtype}, {result.loaded.device})",
        "checkpoint": result.loaded.fingerprint,
        "POPE data": f"{result.pope.source}, SHA-256 {result.pope.sha256}",
        "scenes data": f"{result.scenes.source}, SHA-256 {result.scenes.sha256}",
        "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens, batch of {BATCH_SIZE}",
        "POPE parser": f"profile {result.pope.profile}, arXiv {pope.PAPER}",
    }
    found = runner.versions()
    about |= {"machine": found["platform"], **found["versions"]}
    return page.Content(
        title="A vision-language model with fewer visual tokens and redirected attention",
        lead=lead(result),
        columns=columns(),
        rows=cells(result),
        table_notes=_notes(result),
        section=sink_section(sinks),
        plot=_plot(result),
        examples=examples,
        examples_note=(
            "The first question of each kind that the model answers right without "
            "pruning and at least one method here gets wrong."
            " They are picked to show differences, not to be typical."
        ),
        commands=_commands(name, result.images),
        about=about,
    )


def lead(result: Result) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    base, base_place = result.pope_rows[0], result.scenes_rows[0]
    first = (
        f"{result.loaded.name} answered {len(result.pope.items)} yes/no questions (POPE: "
        "random, popular and adversarial) and "
        f"{len(result.scenes.items)} questions about places and digits, each on "
        f"{result.images} rendered scenes, once as it is and "
        f"{len(result.pope_rows) - 1} times under methods of vlmattn. Nothing was retrained."
    )
    sentences = [first]
    for row, place in list(zip(result.pope_rows, result.scenes_rows, strict=True))[1:]:
        if row.label not in PICTURED:
            continue
        saved = 100 * (1 - row.cost["kv_bytes"] / row.cost["kv_bytes_full"])
        worst = min(
            scenes.TASKS, key=lambda task: _value(place, f"{task}.accuracy") - _value(base_place, f"{task}.accuracy")
        )
        was, now = (_value(entry, f"{worst}.accuracy") for entry in (base_place, place))
        elsewhere = f"\u201c{scenes.TASK_NAMES[worst]}\u201d loses most, {was:.1f} becomes {now:.1f}"
        if now >= was:
            elsewhere = "no right answers are lost on places and digits, counted per task"
        sentences.append(
            f"{row.label}: {row.cost['average_visual_tokens']:.3g} of {row.cost['visual_tokens']:.3g} visual tokens a "
            f"layer on average, {saved:.0f} % of the KV cache saved; POPE F1 {_value(base, 'mean_f1'):.1f} becomes "
            f"{_value(row, 'mean_f1'):.1f}; {elsewhere}."
        )
    return sentences


def make_examples(result: Result, specs: Sequence[str] = PICTURED) -> list[page.Example]:
    """Ask one question per task again under the pictured specs and draw which tokens stayed."""
    labels = [label for label in specs if label in result.texts]
    return [_example(result, item, labels) for item in _pick(result, labels)]


def _pick(result: Result, labels: Sequence[str]) -> list[Item]:
    base = result.texts[result.scenes_rows[0].label]
    chosen = []
    for task in scenes.TASKS:
        right = [item for item in result.scenes.items if item.group == task and scenes.is_right(item, base[item.id])]
        telling = [
            item for item in right if not all(scenes.is_right(item, result.texts[label][item.id]) for label in labels)
        ]
        chosen += (telling or right)[:1]
    return chosen


def _example(result: Result, item: Item, labels: Sequence[str]) -> page.Example:
    from vlmattn import wrap
    from vlmattn.eval.answer import Asker
    from vlmattn.viz import overlay

    loaded, image = result.loaded, result.scenes.open_image(item.image)
    base = result.scenes_rows[0].label
    answers, row = [], []
    for label in (base, *labels):
        with wrap(loaded.model, label, processor=loaded.processor) as session:
            told = Asker(loaded, session, MAX_NEW_TOKENS)([image], [item.question])
            geometry = session.geometry([image], told.inputs)[0]
        panels = overlay.panels(image, geometry, told.report)
        row += panels if label == base else panels[1:]
        answers.append(page.Answer(label, told.texts[0], scenes.is_right(item, told.texts[0])))
    return page.Example(item.question, item.label, answers, overlay.sheet([row]))


def _plot(result: Result) -> str:
    def points(rows: Sequence[summary.Row], key: str) -> list[plots.Point]:
        found = []
        for row, cost in zip(rows, result.pope_rows, strict=True):
            interval = row.intervals.get(key)
            percent = None if interval is None else (100 * interval[0], 100 * interval[1])
            name = row.label.split("(")[0]
            found.append(
                plots.Point(_short(row.label), name, cost.cost["average_visual_tokens"], _value(row, key), percent)
            )
        return found

    return plots.accuracy_plot(
        [
            ("POPE, mean accuracy of the three categories", points(result.pope_rows, "mean_accuracy")),
            ("places and digits, mean exact match", points(result.scenes_rows, "mean_accuracy")),
        ]
    )


def _notes(result: Result) -> list[str]:
    notes = [
        "Visual tokens: mean over the decoder layers and questions. Accuracy and F1 are "
        "means over POPE's three categories; "
        "in small print 95 % intervals from resampling images. Places and digits are scored by exact match.",
        "KV cache: bytes per question after the prefill, and its share of the unpruned one. "
        "Prefill: time to the first token, vision "
        "tower included, per question in a batch; per token: a later step, per question; medians on this machine.",
        "Times are medians of one run on this machine on one thread, whatever else it was doing: trust large "
        "differences only. "
        "Tokens and bytes are exact.",
    ]
    notes += sorted({row.note for row in (*result.pope_rows, *result.scenes_rows) if row.note})
    return notes


def _commands(name: str, images: int) -> list[tuple[str, str]]:
    methods = "none; fastv(keep=0.25, before_layer=2)"
    return [
        ("This page:", f"vlmattn demo --images {images} --out demo.html"),
        (
            "The same questions with your choice of methods, kept in a run folder that can be continued:",
            f'vlmattn eval --model {name} --bench pope --methods "{methods}" --out runs/scenes-pope',
        ),
        (
            "One image and one question, with a picture of the kept tokens:",
            f'vlmattn run scene:3 --model {name} --methods "fastv(keep=0.25, before_layer=2)" --show kept.png',
        ),
        (
            "A real model on the original POPE files (vlmattn eval --help says where to fetch them):",
            "vlmattn eval --model ORG/MODEL --bench pope --data pope/ --images "
            f'val2014/ --methods "{methods}" --out runs/mine',
        ),
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: two that wait for each other stall many times over when something else wants a core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(progress: runner.Progress, name: str, labels: Mapping[str, str]) -> runner.Progress:
    return lambda spec, done, total: progress(f"{name}: {labels[spec]}", done, total)


def _text(row: summary.Row, key: str) -> str:
    return summary.value_text(summary.metric(row.score, key), row.intervals.get(key))


def _value(row: summary.Row, key: str) -> float:
    return 100 * summary.metric(row.score, key)


def _short(label: str) -> str:
    return label.replace("before_layer=", "L").replace("keep=", "").replace("(", " ").replace(")", "").replace(",", "")
