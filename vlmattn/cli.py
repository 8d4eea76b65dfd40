"""The command `vlmattn`: demo, run, eval, discover, check, bench, ... Heavy imports wait inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from vlmattn.errors import DataError, UnknownMethodError, VlmattnError, nearest

if TYPE_CHECKING:
    from vlmattn.eval.runner import Progress
    from vlmattn.eval.summary import Row

OK, INCOMPLETE, MISTAKE, INTERRUPTED = 0, 1, 2, 130
_PIPE_WIDTH = 160


class _Group(TyperGroup):
    """Says our own errors in one red line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VlmattnError as error:
            _console(stderr=True).print(
                f"[bold red]error:[/] [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True
            )
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            _console(stderr=True).print(
                "[yellow]stopped[/]; what was answered is saved: the same command goes on from here"
            )
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune the visual tokens of a Hugging Face vision-language model, redirect its attention, "
    "and see what that costs and saves.\n\n"
    "Start with [bold]vlmattn demo[/]: it needs no download. [bold]vlmattn methods[/] lists what can be installed.\n\n"
    "A method spec is a name with parameters, methods are joined by '+': "
    "[bold]fastv(keep=0.5) + random(keep=0.5, before_layer=3)[/]; [bold]none[/] is the model as it is.",
    epilog="Exit codes: 0 done; 1 done, but some records failed (they are named); 2 a mistake in what was asked.",
)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Embedded model, hub id (org/name) or folder. Default: the embedded model."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16. Default: float32 for the embedded model, else auto."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="A torch device: cpu, cuda, cuda:1. Default: the first GPU, if any.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Let the warnings of transformers through.")]
PresetOption = Annotated[
    Path | None, typer.Option(help="Sink dimensions of the model, in a file that vlmattn discover wrote.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")]


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; rich would assume 80 columns and break the table.
    return Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Options before the command."""
    if version:
        from vlmattn import __version__

        typer.echo(f"vlmattn {__version__}")
        raise typer.Exit


@app.command()
def demo(
    images: Annotated[
        int, typer.Option(help="How many scenes; more narrow the intervals and take longer.", min=2)
    ] = 100,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html"),
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """The embedded model with and without methods: tables here, and one self-contained page.

    No download is needed. Accuracy, F1 and intervals stand beside visual tokens, KV bytes and time, and the page
    shows which tokens were kept.
    """
    from vlmattn.eval import demo as show
    from vlmattn.eval import models, page

    name, console = _embedded(), _console()
    with models.quiet(not verbose):
        with _status(f"loading {name}"):
            loaded = models.load(name, device=device)
            planted = models.load(_planted(), device=device)
        with _progress() as progress:
            result = show.measure(loaded, images, progress=progress)
        with _progress() as progress:
            sinks = show.measure(planted, images, show.SINK_SPECS, progress=progress)
        with _status("drawing"):
            path = page.write(show.content(result, sinks, show.make_examples(result)), out)
    for shown in (result, sinks):
        for table in show.terminal_tables(shown):
            console.print(table)
    console.print(
        "Results of the embedded scenes model; they claim nothing about real models. "
        f"The page: [bold]{escape(str(path))}[/]"
    )


@app.command(
    epilog="Examples:\n\n"
    'vlmattn run scene:3 --methods "fastv(keep=0.25, before_layer=2)" --show kept.png\n\n'
    'vlmattn run cat.jpg "What is on the sofa?" --model ORG/MODEL --methods "fastv(keep=0.5); random(keep=0.5)"'
)
def run(
    image: Annotated[str, typer.Argument(help="An image file, or scene:NUMBER for a rendered scene.")],
    question: Annotated[str | None, typer.Argument(help="What to ask; a scene brings its own question.")] = None,
    methods: Annotated[
        str, typer.Option(help="Specs, separated by ';'. The model as it is always comes first.")
    ] = "fastv(keep=0.5)",
    show: Annotated[Path | None, typer.Option(help="Draw which tokens each stage kept into this picture.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 64,
    model: ModelOption = None,
    preset: PresetOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """One image, one question: the answer with and without, and what it cost."""
    from vlmattn.eval import models, runner, single

    _use_preset(preset)
    specs = runner.split_specs(f"none; {methods}")
    name = models.check_name(model or _embedded())
    picture, asked = single.picture(image, question)
    console = _console()
    with models.quiet(not verbose):
        with _status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        runner.check_specs(loaded, specs)
        with _status("asking"):
            told = [single.ask(loaded, spec, label, picture, asked, max_new_tokens) for spec, label in specs.items()]
        console.print(f"[bold]{escape(asked)}[/]")
        console.print(single.table(told))
        for line in single.stage_lines(told):
            console.print(line, highlight=False)
        if show is not None:
            console.print(f"picture: [bold]{escape(str(single.draw(told, picture, show)))}[/]")


@app.command(
    name="eval",
    epilog="Examples:\n\n"
    'vlmattn eval --methods "none; fastv(keep=0.5); random(keep=0.5)" --limit 60\n\n'
    'vlmattn eval --model ORG/MODEL --data pope/ --images val2014/ --methods "none; '
    'fastv(keep=0.5)" --out runs/mine\n\n'
    "The POPE files are in output/coco of github.com/RUCAIBox/POPE, the images are COCO "
    "val2014. Killed or interrupted, the same "
    "command goes on; a folder that holds another run is refused.",
)
def evaluate(
    methods: Annotated[
        str, typer.Option(help="Specs, separated by ';'. One run folder each.")
    ] = "none; fastv(keep=0.5)",
    bench: Annotated[
        str, typer.Option(help="pope (yes/no), or scenes (places and digits on rendered scenes).")
    ] = "pope",
    model: ModelOption = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the three POPE files; rendered scenes if left out.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with the images the files name. Default: images/ or val2014/ in --data.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: runs/BENCH-MODEL.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of every category.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions asked at once.")] = 16,
    profile: Annotated[str, typer.Option(help="How POPE answers are read: official or lmms_eval.")] = "official",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="bare or single_word (asks for one word or phrase). Default: bare if embedded, else single_word."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Where an answer is cut. Default: 16 for the embedded model, else 128.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    preset: PresetOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the intervals' resampling and of torch.")] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask the failed records of a former run again.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """A benchmark under several methods: accuracy, F1, intervals and cost in one table.

    Every answer is kept as raw text in OUT/METHOD/records.jsonl, safe on the disk as soon as it is counted.
    """
    from vlmattn.eval import bench as benches
    from vlmattn.eval import models, runner, summary

    _use_preset(preset)
    name = model or _embedded()
    specs = runner.split_specs(methods)
    embedded = models.is_embedded(models.check_name(name))
    tokens = max_new_tokens if max_new_tokens is not None else 16 if embedded else 128
    settings = runner.Settings(limit, batch_size, tokens, seed, retry_failed, runner.command_line())
    folder = out or Path("runs") / f"{bench}-{name.strip('/').replace('/', '-')}"
    loaded_bench = benches.load(bench, embedded=embedded, data=data, images=images, profile=profile, prompt=prompt)
    with models.quiet(not verbose):
        with _status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with _progress() as progress:
            rows = runner.sweep(loaded, loaded_bench, specs, folder, settings, progress)
    console = _console()
    console.print(summary.table(loaded_bench, rows))
    _end_notes(console, rows, folder)
    if any(row.failed for row in rows):
        raise typer.Exit(INCOMPLETE)


@app.command(
    epilog="Examples:\n\n"
    "vlmattn discover\n\n"
    "vlmattn discover --model ORG/MODEL --image cat.jpg --image street.jpg --out sinks.json\n\n"
    'vlmattn run cat.jpg "What is this?" --model ORG/MODEL --methods var --preset sinks.json'
)
def discover(
    model: ModelOption = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to look at, best four of them. Default: rendered scenes if embedded, else generated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was found as a preset file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Which hidden dimensions carry attention sinks in a model, and how sure that is; or that it has none.

    Methods that work on sinks need this once for a checkpoint that vlmattn does not know. Eight short prompts are run.
    """
    from vlmattn import discover as finder
    from vlmattn.eval import models

    name = models.check_name(model or _embedded())
    pictures, source = finder.load_images(image or []) or None, "given"
    if pictures is None and models.is_embedded(name):
        pictures, source = finder.scene_pictures(), "scenes"
    with models.quiet(not verbose):
        with _status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with _status("looking"):
            found = finder.discover(loaded.model, loaded.processor, images=pictures, pictures=source)
    if out is not None:
        found.write(
            out, " ".join(["vlmattn discover --model", name, *(f"--image {file.name}" for file in image or [])])
        )
    if as_json:
        _print_json(found.to_dict())
        return
    for part in finder.tables(found):
        _console().print(part, highlight=False, soft_wrap=isinstance(part, str))
    if out is not None:
        _console().print(f"preset: [bold]{escape(str(out))}[/]", highlight=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one, with a line about every parameter.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What can be installed on a model, with parameters and defaults."""
    import vlmattn

    found = vlmattn.methods_info()
    if name is not None:
        known = [entry["name"] for entry in found]
        if name not in known:
            raise UnknownMethodError(f"there is no method {name!r}; {nearest(name, known)}")
        found = [entry for entry in found if entry["name"] == name]
    if as_json:
        _print_json(found)
        return
    if name is not None:
        _print_method(found[0])
        return
    view = _table("methods", ("name", "kind", "paper", "what it does", "parameters"))
    for entry in found:
        fields = ", ".join(f"{field['name']}={field['default']}" for field in entry.get("fields", ()))
        view.add_row(entry["name"], entry["kind"], entry["paper"] or "-", entry.get("summary", ""), fields)
    _console().print(view)
    _console().print(
        'Use: vlmattn run scene:3 --methods "fastv(keep=0.5)". In full: vlmattn methods fastv. Papers are arXiv ids.'
    )


@app.command()
def models(as_json: JsonOption = False) -> None:
    """Which models can be wrapped: the embedded ones, and the families of downloaded ones."""
    import vlmattn
    from vlmattn.scenes import names

    found: list[dict[str, Any]] = [
        {"name": name, "kind": "embedded", "paper": "", "summary": "ships with the package, trained on rendered scenes"}
        for name in names()
    ]
    found += [{**entry, "kind": entry.get("kind") or "family"} for entry in vlmattn.families()]
    if as_json:
        _print_json(found)
        return
    view = _table("models", ("name", "kind", "paper", "config.model_type", "notes"))
    for entry in found:
        notes = entry.get("summary") or ", ".join(
            text
            for text in (f"rope {entry['rope']}" if "rope" in entry else "", "has CLS" if entry.get("has_cls") else "")
            if text
        )
        view.add_row(entry["name"], entry["kind"], entry["paper"] or "-", str(entry.get("model_type", "-")), notes)
    _console().print(view)
    _console().print("Use: --model NAME for an embedded one; any checkpoint of a family by its hub id or folder.")


def _use_preset(file: Path | None) -> None:
    from vlmattn import presets

    if file is not None:
        presets.add(file)


def _planted() -> str:
    """Name of the embedded model with planted attention sinks."""
    from vlmattn.scenes import names

    return next(name for name in names() if name.endswith("-sink"))


def _embedded() -> str:
    from vlmattn.scenes import names

    if not names():
        raise DataError(
            "this installation has no embedded model: its checkpoint is missing; name another one with --model"
        )
    return names()[0]


def _table(title: str, head: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, name in enumerate(head):
        view.add_column(name, no_wrap=number == 0, overflow="fold")
    return view


def _print_method(entry: dict[str, Any]) -> None:
    paper = f" (arXiv {entry['paper']})" if entry["paper"] else ""
    console = _console()
    console.print(f"[bold]{escape(entry['name'])}[/]: {escape(entry['title'])}{paper}", highlight=False)
    console.print(escape(entry["summary"]), highlight=False)
    view = _table("", ("parameter", "default", "meaning"))
    for field in entry["fields"]:
        view.add_row(field["name"], escape(str(field["default"])), escape(field["help"]))
    console.print(view)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _end_notes(console: Console, rows: Sequence[Row], folder: Path) -> None:
    for note in sorted({row.note for row in rows if row.note}):
        console.print(f"[yellow]{escape(note)}[/]")
    for row in rows:
        if row.failed:
            shown = "; ".join(dict.fromkeys(row.failed.values()))
            text = f"{row.label}: {len(row.failed)} questions have no answer: {shown[:500]}"
            _console(stderr=True).print(
                f"[red]{escape(text)}[/] (mend the files, then --retry-failed)", soft_wrap=True, highlight=False
            )
    console.print(f"saved in [bold]{escape(str(folder))}[/] (summary.json, and a run folder per method)")


@contextmanager
def _status(text: str) -> Iterator[None]:
    with _console(stderr=True).status(text):
        yield


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=_console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=total)
            bars.update(tasks[name], completed=done)

        yield show


@app.command(
    epilog="Examples:\n\n"
    "vlmattn check\n\n"
    'vlmattn check --model ORG/MODEL --image cat.jpg --question "What is it?" --methods "fastv(keep=0.5) + vhr"\n\n'
    "Exit codes: 0 everything that applies was proved; 1 something failed; 2 a mistake, or the methods were refused."
)
def check(
    image: Annotated[str, typer.Option(help="An image file, or scene:NUMBER for a rendered scene.")] = "scene:3",
    question: Annotated[str | None, typer.Option(help="What to ask. Default: a plain one.")] = None,
    methods: Annotated[str, typer.Option(help="One spec: what is to be proved.")] = "fastv(keep=0.5) + vhr",
    model: ModelOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove on your checkpoint that methods do what they say: no-op, removal = masking, generation, undo.

    Prints what was measured, and a support row in markdown. In half precision the bounds are looser; the row says so.
    """
    from vlmattn import check as proofs
    from vlmattn.eval import models, single
    from vlmattn.spec import parse

    parse(methods)
    name = models.check_name(model or _embedded())
    plain = None if image.startswith("scene:") else "What is in the image?"
    picture, asked = single.picture(image, question or plain)
    with models.quiet(not verbose):
        with _status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with _status("proving"):
            result = proofs.check(loaded.model, loaded.processor, picture, asked, methods, name=name)
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_check(result)
    if not result.passed:
        raise typer.Exit(INCOMPLETE)
    if result.refused:
        raise typer.Exit(MISTAKE)


def _print_check(result: Any) -> None:
    from vlmattn.check import SUPPORT_HEAD

    colours = {"pass": "green", "FAIL": "bold red", "refused": "yellow", "n/a": "dim"}
    view = _table(f"{result.spec} on {result.model} ({result.dtype})", ("claim", "", "measured", "bound", "compared"))
    for row in result.rows:
        verdict = f"[{colours[row.verdict]}]{row.verdict}[/]"
        numbers = ["" if number is None else f"{number:.2g}" for number in (row.value, row.tolerance)]
        view.add_row(row.name, verdict, *numbers, escape(row.explanation))
    _console().print(view)
    # the support row is one line, to be copied into a table
    typer.echo(f"{SUPPORT_HEAD}\n{result.support_row()}")


@app.command()
def bench(
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Default: 24.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width, a multiple of 128. Default: 1024.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Visual tokens. Default: 2048.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds. Default: 7.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: torch's choice.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the record, the page and the picture.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A small model, two rounds: shows that it works.")] = False,
) -> None:
    """Time against arithmetic: a large random model, plain, pruned and edited, in one interleaved run.

    Proofs come first; while one fails, nothing is timed. Takes about ten minutes on two quiet cores.
    """
    from vlmattn.bench import __main__ as command

    given = {"layers": layers, "dim": dim, "tokens": tokens, "repeats": repeats, "threads": threads, "out": out}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    raise typer.Exit(command.main([*words, *(["--quick"] if quick else [])]))
