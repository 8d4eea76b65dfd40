"""`vlmattn compare`: runs over the same questions, tested against the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import app
from vlmattn.errors import DataError

if TYPE_CHECKING:
    from vlmattn.eval.compare import Comparison
    from vlmattn.eval.runs import Run


@app.command(
    epilog="Examples:\n\n"
    "vlmattn compare runs/mine\n\n"
    "vlmattn compare runs/mine/none 'runs/mine/fastv-keep=0.5' --flips 20 --html compare.html\n\n"
    "Exit codes: 0 compared; 1 compared, but a run has questions without an answer; 2 a mistake, or the runs must not "
    "be compared."
)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, or folders of sweeps. The first is the one compared with."),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Compare runs that differ in data, prompt, decoding or model, or are unfinished."),
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="Read all answers by this profile. Default: as when they were run.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="Word table (JSON) captions are scored with. Default: as when they were run.")
    ] = None,
    metrics: Annotated[
        Literal["headline", "all"], typer.Option(help="Which metrics the terminal shows; --json and --html have all.")
    ] = "headline",
    flips: Annotated[int, typer.Option(help="How many changed answers are shown.", min=0)] = 6,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page, with the images.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of tables.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
) -> None:
    """What differs between runs, whether that can be chance, and which answers changed.

    Needs no model and no data. Every run is compared with the first, on the questions that both answered.
    """
    from vlmattn.eval import compare as comparing
    from vlmattn.eval.runner import check_seed

    check_seed(seed)
    with common.status("comparing"):
        loaded = _load(runs, profile, words, force)
        found = comparing.compare(loaded, force=force, seed=seed)
    if html is not None:
        from vlmattn.eval import views

        with common.status("drawing"):
            page = views.write_comparison(html, found)
    if as_json:
        common.print_json([entry.to_dict() for entry in found])
    else:
        _show(found, metrics == "all", flips)
        if html is not None:
            common.console().print(f"page: [bold]{escape(str(page))}[/]", highlight=False, soft_wrap=True)
    if any(run.failed for run in loaded):
        raise typer.Exit(common.INCOMPLETE)


def _load(paths: list[Path], profile: str | None, words: Path | None, partial: bool) -> list[Run]:
    from vlmattn.eval.runs import Run, find

    folders: dict[Path, tuple[Path, str | None]] = {}
    for path in paths:
        for folder, label in find(path):
            folders.setdefault(folder.resolve(), (folder, label))
    if len(folders) < 2:
        raise DataError(
            f"a comparison needs two runs; {', '.join(map(str, paths))} is only one: name another run folder beside it"
        )
    return [
        Run.load(folder, profile=profile, words=words, label=label, partial=partial)
        for folder, label in folders.values()
    ]


def _show(found: list[Comparison], every: bool, flips: int) -> None:
    from vlmattn.eval import compare as comparing

    console = common.console()
    for comparison in found:
        for table in comparing.tables(comparison, every=every):
            console.print(table)
        shown = comparing.flip_table(comparison, flips)
        if shown is not None:
            console.print(shown)
        for text in comparing.power_notes(comparison):
            console.print(escape(text), highlight=False)
        for text in comparison.notes:
            console.print(f"[yellow]{escape(text)}[/]", highlight=False)
        console.print()
    for text in comparing.explanations(found):
        console.print(f"[dim]{escape(text)}[/]", highlight=False)
