"""`vlmattn demo`: the embedded model answers with and without methods; tables and one self-contained page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmattn.eval import bench as benches
from vlmattn.eval import flipped, grid, models, page, page_tables, plots, runner, sentences, summary, tabular, views
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Benchmark, Item

if TYPE_CHECKING:
    from rich.table import Table

    from vlmattn.eval.models import Loaded
    from vlmattn.eval.runs import Run

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
PLACES = ("loc", "cell", "digits")
METRICS = ("mean_accuracy", "mean_f1", "loc.hit", "cell.accuracy", "digits.accuracy")
"""Columns of the demo's tables: POPE's two, and one of each other task."""
IMAGES = 30
BATCH_SIZE = 30
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Attributes:
        loaded: the embedded model.
        bench: what was asked.
        runs: the answers per spec.
        rows: a row per run, in the same order, the baseline first.
        images: how many scenes were used.
    """

    loaded: Loaded
    bench: Benchmark
    runs: Sequence[Run]
    rows: Sequence[summary.Row]
    images: int


def measure(
    loaded: Loaded, images: int = IMAGES, specs: Sequence[str] = SPECS, progress: runner.Progress | None = None
) -> Result:
    """Ask every spec the same questions; the run folders are temporary, `vlmattn eval` is for keeping them.

    Args:
        loaded: the embedded model.
        images: scenes asked about.
        specs: spec texts; the first one is what the others are compared with.
        progress: called with (spec, done, all).
    """
    tasks = (*pope.CATEGORIES, *PLACES)
    world = models.world(loaded.name)
    bench = benches.load("scenes", embedded=True, scenes_count=images, tasks=tasks, world=world)
    settings = runner.Settings(batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS, command="vlmattn demo")
    with tempfile.TemporaryDirectory(prefix="vlmattn-demo-") as out:
        jobs = [
            runner.Job(label, spec, label, bench, bench.items, Path(out) / runner.slug(spec))
            for spec, label in grid.expand("; ".join(specs)).items()
        ]
        runs = list(runner.answer_all(loaded, jobs, settings, progress).values())
    first, *others = runs
    rows = [summary.row(first, role="baseline"), *(summary.row(run, first) for run in others)]
    return Result(loaded, bench, runs, rows, images)


def terminal_tables(result: Result) -> list[Table]:
    """Two tables that fit a terminal: what is answered right, and what it costs."""
    shown = [metric for metric in summary.metrics(result.rows) if metric.key in METRICS]
    answers = [[row.label, *(tabular.cell(row, metric) for metric in shown)] for row in result.rows]
    cost = [[row.label, tabular.tokens_text(row.cost), *tabular.cost_texts(row.cost)] for row in result.rows]
    name, base = result.loaded.name, result.rows[0].label
    return [
        tabular.terminal_table(
            f"{name}: right answers, with a sign the difference to {base} (* more than chance), 95 % intervals",
            ["method", *map(summary.title, shown)],
            answers,
        ),
        tabular.terminal_table(
            f"{name}: cost per question", ["method", "visual tokens", "KV cache", "prefill", "per token"], cost
        ),
    ]


def content(result: Result, sinks: Result) -> page.Page:
    """Everything the page shows."""
    name = result.loaded.name
    tasks = "; ".join(f"{task}: {scenes.TASK_NAMES[task]}" for task in PLACES)
    return page.Page(
        title="A vision-language model with fewer visual tokens and redirected attention",
        lead=lead(result),
        sections=[
            page_tables.accuracy_table(
                result.rows,
                METRICS,
                title="Right answers",
                notes=[f"Yes/no: is it there, means over POPE's three categories. {tasks}."],
            ),
            page_tables.cost_table(result.rows),
            page.Prose(
                "Redistribution, reinforcement and all three, on a model with planted sinks",
                [
                    f"{sinks.loaded.name} is the same model after an edit of its weights that makes a few "
                    "background tokens soak up attention, as happens by itself in large models. The model above has no "
                    "such sinks, so that var has nothing to redistribute there. The sinks are artificial: these tables "
                    "show that the methods act and compose, not that they help."
                ],
            ),
            page_tables.accuracy_table(sinks.rows, METRICS, title=""),
            page_tables.cost_table(sinks.rows, title=""),
            page.Plot(
                "What is lost for how many tokens",
                _plot(result),
                ["Upper left is better: few tokens, many right answers. Bars are 95 % intervals."],
            ),
            page.Gallery(
                "Which tokens stayed",
                examples(result),
                [
                    f"Of each task the first question that the model answers right under {result.rows[0].label} and "
                    "only some of the methods here do, if there is one. They are picked to show differences, not to be "
                    "typical. Kept tokens are bright with an orange edge, dropped ones dim."
                ],
            ),
            page.Prose(
                "What this does and does not show",
                [
                    "These are results of a small model that ships with the package and was trained on rendered "
                    "scenes. It is made of the same transformers classes as the large models: the "
                    "software that runs here is the software that runs there. The numbers claim nothing about any real "
                    "vision-language model: measure yours with the commands below."
                ],
                warning=True,
            ),
            page.Commands("Do it again, or with your model", _commands(name, result.images)),
            page.Facts("Versions and data", views.facts([*result.runs, *sinks.runs], {})),
        ],
    )


def lead(result: Result) -> list[str]:
    """What the tables say, in sentences made from their numbers."""
    first = (
        f"{result.loaded.name} answered {len(result.bench.items):,} questions about {result.images} rendered scenes, "
        "yes/no questions (POPE: random, popular and adversarial) and questions about places and digits, once as it "
        f"is and {len(result.rows) - 1} times under methods of vlmattn. Nothing was retrained."
    )
    base = result.rows[0].label
    return [first, *(sentences.sentence(row, base) for row in result.rows[1:])]


def examples(result: Result, specs: Sequence[str] = PICTURED) -> list[page.Example]:
    """A question per task of places and digits with its answers under some specs, and which tokens stayed.

    Args:
        result: what was measured.
        specs: labels of its runs; those that it does not have are left out.
    """
    runs = [result.runs[0], *(run for run in result.runs[1:] if run.label in specs)]
    records = [{record["id"]: record for record in run.records} for run in runs]
    found = []
    for item in _telling(runs):
        seen = [(run.label, kept[item.id]) for run, kept in zip(runs, records, strict=True)]
        found.append(
            page.Example(
                question=item.question,
                expected=item.label,
                answers=[
                    page.Answer(run.label, record["text"], run.tally.marks[item.id])
                    for run, (_, record) in zip(runs, seen, strict=True)
                ],
                pictures=flipped.pictures(result.bench.open_image(item.image), item.image, seen),
                task=item.group,
            )
        )
    return found


def _telling(runs: Sequence[Run]) -> list[Item]:
    """Of every task the first item that the first run has right and that tells the others apart; where there is none,
    one that another has wrong, or else any."""
    first, *others = runs

    def tells(item: Item) -> int:
        marks = [bool(run.tally.marks.get(item.id)) for run in others]
        return (not all(marks)) + (any(marks) and not all(marks))

    chosen = []
    for task in PLACES:
        right = [item for item in first.items if item.group == task and first.tally.marks.get(item.id)]
        chosen += [max(right, key=tells)] if right else []
    return chosen


def _plot(result: Result) -> str:
    graphs = (("mean_accuracy", "yes/no questions"), ("mean_exact", "places and digits by exact match"))
    return plots.draw([plots.graph(result.rows, key, "tokens", name) for key, name in graphs])


def _commands(name: str, images: int) -> list[tuple[str, str]]:
    methods = "none; fastv(keep=0.25, before_layer=2)"
    return [
        ("This page:", f"vlmattn demo --images {images} --out demo.html"),
        (
            "All tasks of the scenes with your choice of methods, kept in run folders that can be continued:",
            f'vlmattn eval --model {name} --bench scenes --methods "{methods}" --out runs/scenes',
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
