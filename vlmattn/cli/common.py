"""What the commands share: the application, exit codes, options, the console, tables and progress."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from vlmattn.errors import DataError, VlmattnError, VlmattnWarning

if TYPE_CHECKING:
    from rich.table import Table

    from vlmattn.eval.runner import Progress

OK, INCOMPLETE, MISTAKE, INTERRUPTED = 0, 1, 2, 130
_PIPE_WIDTH = 160
_LABEL = 26


class Group(TyperGroup):
    """Says our own errors and warnings in one line, without a traceback or a place in the source."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _tell(warnings.showwarning)
                return super().invoke(ctx)
        except VlmattnError as error:
            console(stderr=True).print(
                f"[bold red]error:[/] [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True
            )
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            console(stderr=True).print(
                "[yellow]stopped[/]; what was answered is saved: the same command goes on from here"
            )
            raise typer.Exit(INTERRUPTED) from None


def _tell(others: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: our own as a line, those of others as before."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, VlmattnWarning):
            console(stderr=True).print(f"[yellow]note:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
        else:
            others(message, category, *place, **more)

    return show


app = typer.Typer(
    cls=Group,
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
TextTowerOption = Annotated[
    str | None,
    typer.Option(
        "--text-tower",
        metavar="CLIP",
        help="Hub id or folder of the CLIP model that the vision tower is from, for methods that read the question.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")]


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error as it is now (tests replace the streams)."""
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; rich would assume 80 columns and break the table.
    return Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH)


def use_preset(file: Path | None) -> None:
    """Make the sink dimensions of a file known, if one is given.

    Raises:
        DataError: the file is missing or is no preset.
    """
    from vlmattn import presets

    if file is not None:
        presets.add(file)


def embedded() -> str:
    """Name of the model that commands use when none is given.

    Raises:
        DataError: this installation has none.
    """
    from vlmattn.scenes import names

    if not names():
        raise DataError(
            "this installation has no embedded model: its checkpoint is missing; name another one with --model"
        )
    return names()[0]


def table(title: str, head: Sequence[str]) -> Table:
    """An empty table in the commands' style; the first column is never wrapped."""
    from rich import box
    from rich.table import Table

    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, name in enumerate(head):
        view.add_column(name, no_wrap=number == 0, overflow="fold")
    return view


def print_json(value: Any) -> None:
    """One JSON document on standard output; what JSON does not know is shown as text."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on standard error inside the block."""
    with console(stderr=True).status(text):
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on standard error inside the block: call what it gives with (name, done, in all)."""
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
    with Progress(*parts, console=console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=total)
            bars.update(tasks[name], completed=done)

        yield show


@contextmanager
def sweep_progress(labels: Mapping[str, str]) -> Iterator[Progress]:
    """One bar on standard error for a whole sweep: which run of how many, all questions, and the time left.

    Args:
        labels: what the runs are called.

    Yields:
        What is to be called with (run, done, in all): once for every run first, then as they go on.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bars = Progress(*parts, console=console(stderr=True))
    try:
        task = bars.add_task("starting", total=None, left="")
        counts: dict[str, tuple[int, int]] = {}
        start: tuple[float, int] | None = None

        def show(name: str, done: int, total: int) -> None:
            nonlocal start
            announced = name not in counts
            counts[name] = (done, total)
            ready, whole = (sum(column) for column in zip(*counts.values(), strict=True))
            if announced:
                bars.start()  # not before: what the runs refuse is told without a bar above it
                bars.update(task, completed=ready, total=whole)
                return
            start = start or (time.monotonic(), ready)
            fresh = ready - start[1]
            left = "" if not fresh else f"{_clock((time.monotonic() - start[0]) * (whole - ready) / fresh)} left"
            label = labels.get(name, name)
            place = f"{list(counts).index(name) + 1}/{len(counts)}"
            text = f"{place} {label if len(label) <= _LABEL else label[: _LABEL - 1] + '…'}"
            if ready == whole:
                text, left = "writing tables and page", ""
            bars.update(task, description=escape(text), completed=ready, left=left)

        yield show
    finally:
        if bars.live.is_started:  # else it would leave an empty line
            bars.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
