"""`vlmattn eval`: a benchmark under several methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, PresetOption, TextTowerOption, VerboseOption, app
from vlmattn.errors import DataError

if TYPE_CHECKING:
    from vlmattn.eval.summary import Row

_ROUNDS = 5
_WHAT, _COMPARED, _HOW = "What is run", "What it is compared with", "How it is run"


@app.command(
    name="eval",
    help="A benchmark under several methods: accuracy, intervals, differences and cost in one table.\n\n"
    "The model as it is comes first, and every other row is tested against it. Every answer is kept as raw text in "
    "OUT/METHOD/records.jsonl, safe on the disk as soon as it is counted. OUT gets the table as summary.json, "
    "table.csv, table.md and table.tex, the plot as accuracy.svg, and index.html, a page with everything.",
    epilog="Examples:\n\n"
    'vlmattn eval --bench scenes --methods "fastv; random; uniform" --keep 0.5,0.25 --limit 60\n\n'
    "vlmattn eval --bench scenes --methods prune --markdown pruners.md\n\n"
    'vlmattn eval --methods "fastv(keep=0.25)" --range before_layer=1..4 --controls\n\n'
    'vlmattn eval --bench scenes --tasks color,digits --methods "fastv; uniform" --match auto\n\n'
    "vlmattn eval --model ORG/MODEL --data pope/ --images val2014/ --methods fastv --keep 0.5 --out runs/mine\n\n"
    "The POPE files are in output/coco of github.com/RUCAIBox/POPE, the images are COCO val2014. Killed or "
    "interrupted, the same command goes on; a folder that holds another run is refused.",
)
def evaluate(
    methods: Annotated[
        str,
        typer.Option(
            help="Specs, separated by ';', one row and one run folder each; or a kind, prune or attend: all such "
            "methods that the model can take.",
            rich_help_panel=_WHAT,
        ),
    ] = "fastv",
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="VALUES",
            help="Run every spec that leaves keep open with each of these: 0.5,0.25 are shares, 64 a number of tokens.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="FIELD=VALUES",
            help="The same for any parameter, as a list or from..to:step: before_layer=1..4. Repeatable: all "
            "combinations.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="LEVELS",
            help="Choose keep so that all leave the same share of visual tokens, averaged over the layers: auto, or "
            "levels such as 0.75,0.5. Default: auto for a kind of methods without --keep.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    bench: Annotated[
        str,
        typer.Option(help="pope (is it there?), or scenes (all tasks, rendered).", rich_help_panel=_WHAT),
    ] = "pope",
    tasks: Annotated[
        str | None,
        typer.Option(help="Of --bench scenes, these only: random,color,digits,caption ...", rich_help_panel=_WHAT),
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(help="How many scenes are rendered. Default: 100.", min=1, rich_help_panel=_WHAT)
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(
            help="Which version of the scenes is rendered. Default: the one that an embedded model knows, else 2.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the three POPE files; rendered scenes if left out.", rich_help_panel=_WHAT),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the images the files name. Default: images/ or val2014/ in --data.", rich_help_panel=_WHAT
        ),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="Word table (JSON) that captions are scored with.", rich_help_panel=_WHAT)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N questions of every task.", rich_help_panel=_WHAT)
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="SPEC", help="What the others are compared with; it is the first row.", rich_help_panel=_COMPARED
        ),
    ] = "none",
    with_controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Add rows that a method must beat: no image, random and evenly spread tokens at its layer, and for "
            "yes/no questions a constant bias. Default: only for a kind of methods.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    control_seeds: Annotated[
        int, typer.Option(help="Draws of random tokens per layer.", min=1, rich_help_panel=_COMPARED)
    ] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Time a prefill under every row, taking turns, this often. Default: 5 for a kind of methods, else 0: "
            "not at all.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    model: ModelOption = None,
    text_tower: TextTowerOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep. Default: runs/BENCH-MODEL.", rich_help_panel=_HOW)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table as markdown to this file, too.", rich_help_panel=_HOW)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions asked at once.", rich_help_panel=_HOW)] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Where an answer is cut. Default: 64 for an embedded model, else 128.", rich_help_panel=_HOW),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="How yes/no answers are read: official or lmms_eval.", rich_help_panel=_HOW)
    ] = "official",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="bare or single_word (asks for one word or phrase). Default: bare if embedded, else single_word.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the intervals' resampling and of torch.", rich_help_panel=_HOW)
    ] = 0,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Ask the failed records of a former run again.", rich_help_panel=_HOW),
    ] = False,
    share_vision: Annotated[
        bool,
        typer.Option(
            help="Compute vision features once for all methods (up to 2 GiB on the device).", rich_help_panel=_HOW
        ),
    ] = True,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    preset: PresetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """A benchmark under several methods, in one table. See the command's help."""
    from vlmattn.eval import bench as benches
    from vlmattn.eval import grid, lineup, models, runner, summary, tabular
    from vlmattn.eval.records import write_text

    common.use_preset(preset)
    name = model or common.embedded()
    fields = grid.fields(keep, ranges or ())
    specs = lineup.with_baseline(grid.expand(methods, fields), baseline)
    group = grid.grouped(methods)
    match = "auto" if group and match is None and not any(grid.fills(name) == "keep" for name in fields) else match
    with_controls = bool(group) if with_controls is None else with_controls
    levels = None if match is None else lineup.levels(match)
    if levels is not None and (given := [name for name in fields if grid.fills(name) == "keep"]):
        raise DataError(f"--match chooses keep itself; leave the values of {', '.join(given)} out, or --match")
    embedded = models.is_embedded(models.check_name(name))
    settings = runner.Settings(
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens if max_new_tokens is not None else 64 if embedded else 128,
        seed=seed,
        retry_failed=retry_failed,
        command=runner.command_line(),
        threshold=with_controls,
        share_vision=share_vision,
        rounds=(_ROUNDS if group else 0) if rounds is None else rounds,
    )
    folder = out or Path("runs") / f"{bench}-{name.strip('/').replace('/', '-')}"
    if scenes is not None and data is not None:
        raise DataError("--scenes is for rendered images; with --data, --limit takes fewer questions")
    loaded_bench = benches.load(
        bench,
        embedded=embedded,
        data=data,
        images=images,
        profile=profile,
        prompt=prompt,
        scenes_count=benches.SCENES if scenes is None else scenes,
        tasks=None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()],
        world=world or (None if data is not None else models.world(name)),
        words=words,
    )
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device, text_tower)
            members = [spec for spec in specs if spec.partition("(")[0] in group]
            refused = runner.refusals(loaded, members)
            runner.check_specs(loaded, [spec for spec in specs if spec not in members])
        entries = lineup.line_up(
            specs,
            num_layers=loaded.model.config.get_text_config().num_hidden_layers,
            visual_tokens=runner.visual_tokens(loaded, loaded_bench) if levels is not None or with_controls else 0,
            levels=levels,
            seeds=control_seeds if with_controls else 0,
            refused=refused,
        )
        with common.sweep_progress({entry.spec: entry.label for entry in entries}) as progress:
            rows = runner.sweep(loaded, loaded_bench, entries, folder, settings, progress)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        write_text(markdown, (folder / summary.MARKDOWN).read_text(encoding="utf-8"))
    console = common.console()
    title = f"{loaded_bench.name}: {loaded_bench.source}"
    for table in tabular.tables(title, rows, console.width):
        console.print(table)
    _end_notes(console, rows, folder, with_controls)
    if any(row.failed for row in rows):
        raise typer.Exit(common.INCOMPLETE)


def _end_notes(console: Console, rows: Sequence[Row], folder: Path, controlled: bool) -> None:
    from vlmattn.eval import tabular

    for note in tabular.notes(rows):
        console.print(escape(note), style="dim", highlight=False)
    for row in rows:
        if row.failed:
            shown = "; ".join(dict.fromkeys(row.failed.values()))
            text = f"{row.label}: {len(row.failed)} questions have no answer: {shown[:500]}"
            common.console(stderr=True).print(
                f"[red]{escape(text)}[/] (mend the files, then --retry-failed)", soft_wrap=True, highlight=False
            )
    if not controlled and len(rows) > 1:
        console.print("Controls are missing: --controls adds what random tokens and no image reach.", highlight=False)
    files = "index.html (everything on one page), summary.json, table.md, table.csv, table.tex, accuracy.svg"
    console.print(f"Saved in [bold]{escape(str(folder))}[/]: {files}; a folder per run", highlight=False)
